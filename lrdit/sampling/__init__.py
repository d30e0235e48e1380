"""The sliced sampler and the sample sets it writes."""
