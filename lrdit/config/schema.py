"""Every config field, declared once: its default, meaning, allowed values and role.

Config files import this module before jax is set up, so it imports neither numpy nor jax.
"""

import functools
from typing import Any

from ml_collections import ConfigDict, config_dict

from lrdit.config.checks import PATH, choice, number, rising, rule, several, span, whole
from lrdit.config.field import Field, Role, group
from lrdit.runtime.errors import UserError

LARGEST_SEED = 2**32 - 1
LARGEST_BATCH = 2**20
# Fields that may be None, where an old 0 does not stand for it.
NEVER_ZERO = ("optimizer.beta2", "curriculum.middle_group", "training.num_steps", "export.bucket")
FLOAT32 = "(1e-37, 1e30)"  # numbers that stay finite and above 0 in float32


def _is_name(value: str) -> bool:
  is_file_name = "/" not in value and value not in ("", ".", "..")
  return is_file_name and value.isprintable() and len(value) <= 100


_SEED, _BATCH, _FLOAT = whole(0, LARGEST_SEED), whole(1, LARGEST_BATCH), number(FLOAT32)
_SHARE, _WEIGHT = number("(0, 1]"), number("[0, 1e30)")
_NAME = "the name of a directory to make, without '/', of at most 100 printable characters"
_VARIANT, _BETA2 = "the variant's", "0.999 for adamw, 0.99 for lion"
_WARM = "(1 + s) / (10 + s), after s updates"
_RANKS = rule(lambda ranks: all(map(whole(0).accepts, ranks)), "whole numbers from 0")
_PATTERNS = rule(lambda names: all(isinstance(n, str) for n in names), "names of layers")
_SECTIONS = ("flops", "weights", "gradients", "truncation")

FIELDS: dict[str, Field] = {
  **group("", Role.RUN)(
    seed=Field(0, "Seed of the parameters, batches, noise and timesteps", _SEED),
    method=Field("adaptive", "Arm", choice(names="config.derive.METHODS")),
  ),
  **group("data", Role.RUN)(
    name=Field("", "Dataset", choice(names="data.pipeline.LOADERS")),
    data_dir=Field("", "Directory or file of the data", PATH, role=Role.FREE),
    image_size=Field(None, "Height and width in pixels", whole(1, 2**16)),
    num_channels=Field(3, "Color channels", rule(lambda n: n in (1, 3), "3, or 1 for gray")),
    num_classes=Field(0, "Number of classes, taken from the first; 0 ignores labels", whole(0)),
    flip=Field(False, "Mirror images left to right with probability one half"),
    cache_gib=Field(4.0, "Largest decoded split to cache", number("[0, 1e6]"), role=Role.FREE),
    skip_unreadable=Field(False, "Leave out images of a folder that cannot be read"),
  ),
  **group("vae", Role.RUN)(
    downsample_factor=Field(None, "Pixels along a latent's side", whole(), "pixels, no VAE"),
    latent_channels=Field(4, "Channels of a latent", whole()),
    path=Field("", "AutoencoderKL of diffusers: directory or safetensors", PATH, role=Role.FREE),
    latents_dir=Field("", "Directory that `--mode=encode` wrote", PATH, role=Role.FREE),
    batch_size=Field(32, "Images in flight over all devices", _BATCH, role=Role.FREE),
    encode_on_the_fly=Field(False, "Encode images as they are read, instead of `latents_dir`"),
  ),
  **group("model", Role.RUN)(
    variant=Field("S/2", "Size and patch; docs/running.md lists the sizes"),
    hidden_size=Field(
      None, "Width; that of `narrow` is derived from it", whole(1, 2**16), _VARIANT
    ),
    depth=Field(None, "Blocks", whole(1, 10_000), _VARIANT),
    num_heads=Field(None, "Attention heads", whole(), _VARIANT),
    patch_size=Field(None, "Pixels along a patch's side", whole(), _VARIANT),
    dtype=Field(
      "float32",
      "Dtype of the products' operands, and on accelerators of activations too",
      choice("float32", "bfloat16"),
      role=Role.PROCESS,
    ),
    remat=Field(False, "Recompute blocks in the backward pass to save memory", role=Role.PROCESS),
    scan_blocks=Field(False, "Compile equal blocks once (slower on CPUs)", role=Role.PROCESS),
    class_dropout_rate=Field(0.1, "Share of labels replaced by the null class", number("[0, 1]")),
    learn_sigma=Field(False, "Learn the reverse process's variance"),
    frequency_shift=Field(
      0,
      "Timestep frequencies are 10000^(-i / (128 - shift)): 0 as published, 1 as in diffusers",
      whole(0, 1),
    ),
  ),
  **group("rank", Role.RUN)(
    ratio=Field(0.5, "Share of a dense layer's parameters that the static arm keeps", _SHARE),
    layer_ranks=Field(
      (),
      "Static ranks of the low-rank layers in their order, 0 for a dense one, instead of `ratio`; "
      "`init.energy` chooses them",
      _RANKS,
    ),
    schedule=Field(
      "logistic_decreasing",
      "Shape of r(t); `measured` reads it from an analysis",
      choice("measured", names="rank.schedules.SCHEDULES"),
    ),
    logistic_steepness=Field(8.0, "Steepness of the logistic schedules", number("[0.001, 500]")),
    logistic_midpoint=Field(0.6, "Midpoint of the logistic schedules' ramp", number("[0, 1]")),
    min_ratio=Field(0.4, "Smallest active rank as a share of the largest", _SHARE),
    analysis=Field("", "`measured`: an analysis/truncation.json", PATH, role=Role.FREE),
    monotone=Field(False, "`measured`: smooth r(t) so that it never rises"),
    measured_shares=Field((), "`measured`: shares of the largest rank, read from the analysis"),
    measured_boundaries=Field((), "`measured`: the shares' timestep groups"),
    match=Field(
      "activated",
      "Set the mean (`activated`) or the largest (`total`) active rank to the static rank",
      choice(names="rank.plan.MATCHES"),
    ),
    num_buckets=Field(4, "Levels of the quantized schedule", whole(1, 1000)),
    multiple_of=Field(8, "Active ranks are multiples of this", whole()),
    first_n_blocks=Field(
      None, "Factorize only layers of the first blocks; others are dense", whole(), "all"
    ),
    last_n_blocks=Field(
      None, "Factorize only layers of the last blocks; others are dense", whole(), "all"
    ),
    adaptive_first_n_blocks=Field(
      None, "Adapt only layers of the first blocks; others keep the static rank", whole(), "all"
    ),
    adaptive_last_n_blocks=Field(
      None, "Adapt only layers of the last blocks; others keep the static rank", whole(), "all"
    ),
    dense_layers=Field(
      ("patch_embed", "blocks_0/mlp", "final_layer/linear"), "Patterns of dense layers", _PATTERNS
    ),
    compute=Field(
      "grouped",
      "Training: each group of examples at its rank (`grouped`), or the `masked` reference",
      choice(names="rank.strata.COMPUTES"),
      role=Role.PROCESS,
    ),
  ),
  **group("diffusion", Role.RUN)(
    num_train_timesteps=Field(1000, "T", whole(2, 1_000_000)),
    noise_schedule=Field(
      "squaredcos_cap_v2", "Noise schedule", choice(names="diffusion.process.NOISE_SCHEDULES")
    ),
    prediction=Field("epsilon", "Target", choice(names="diffusion.process.PREDICTIONS")),
    loss_weighting=Field(
      "uniform", "Weight of a timestep's loss", choice(names="diffusion.process.LOSS_WEIGHTINGS")
    ),
    timesteps=Field(
      "stratified",
      "Training's timesteps: `stratified` over the batch, or `iid`, all at the largest rank",
      choice(names="rank.strata.TIMESTEPS"),
    ),
    min_snr_gamma=Field(5.0, "Cap of the signal-to-noise ratio in `min_snr`", _FLOAT),
    variance_floor=Field(
      "beta",
      "Least learned variance at t = 0: 0.01 beta_0, or the `posterior`'s at t = 1 as published",
      choice(names="diffusion.process.VARIANCE_FLOORS"),
    ),
  ),
  **group("curriculum", Role.RUN)(
    enabled=Field(False, "Train on a growing set of timestep groups"),
    start=Field("high", "First group", choice(names="train.curriculum.STARTS")),
    middle_group=Field(
      None, "First group of `start=middle`, from 0", whole(0), "the lower of the middle ones"
    ),
    boundaries=Field(
      (0, 44, 123, 234, 371, 520, 667, 796, 897, 966, 1000),
      "Timestep groups of the curriculum and of losses; scaled to T without a curriculum",
    ),
    patience=Field(5, "Checks without improvement that end a stage", whole(), role=Role.TUNABLE),
    check_every_steps=Field(1000, "Steps between checks", whole(), role=Role.TUNABLE),
    restart_optimizer=Field(False, "Begin each stage with fresh moments and a new warm-up"),
    restart_decay=Field(False, "Begin each stage with a new decay, which ends with the run"),
    warmup_ratio=Field(
      1.0,
      "A later stage's new warm-up (`restart_optimizer`), over `optimizer.warmup_steps`",
      number("[0, 1]"),
      role=Role.TUNABLE,
    ),
    learning_rate_decay=Field(
      0.0,
      "Stage s, from 0, has 1 - s times this of the peak learning rate",
      number("[0, 1)"),
      role=Role.TUNABLE,
    ),
  ),
  **group("optimizer", Role.TUNABLE)(
    name=Field("adamw", "Optimizer", choice(names="train.optimizer.OPTIMIZERS"), role=Role.RUN),
    learning_rate=Field(1e-4, "Peak learning rate", _FLOAT),
    decay=Field("constant", "After the warm-up", choice(names="train.optimizer.DECAYS")),
    warmup_steps=Field(3000, "Steps of linear warm-up", whole(0)),
    weight_decay=Field(0.0, "Decoupled weight decay of matrices", number("[0, 1e30)")),
    beta1=Field(0.9, "Decay of the first moment", number("[0, 1)"), role=Role.RUN),
    beta2=Field(None, "Decay of the second moment", number("[0, 1)"), _BETA2, role=Role.RUN),
    epsilon=Field(1e-8, "Epsilon of AdamW", _FLOAT, role=Role.RUN),
    muon_layers=Field(
      ("blocks_*",), "Patterns of layers whose matrices Muon updates", _PATTERNS, role=Role.RUN
    ),
    muon_momentum=Field(0.95, "Nesterov momentum of Muon", number("[0, 1)"), role=Role.RUN),
    muon_newton_schulz_steps=Field(5, "Newton-Schulz steps of Muon", whole(1, 100), role=Role.RUN),
    muon_consistent_rms=Field(
      0.2, "RMS of Muon's update per learning rate", _FLOAT, "scale by sqrt(max(1, D_out / D_in))"
    ),
    muon_learning_rate_ratio=Field(1.0, "Muon's learning rate over AdamW's", _FLOAT),
    factor_update=Field(
      "whole",
      "Muon's rule for a layer's factors",
      choice(names="train.muon.FACTOR_UPDATES"),
      role=Role.RUN,
    ),
    galore_rank=Field(
      128, "Rank that `galore` projects a matrix's gradient to", whole(), role=Role.RUN
    ),
    galore_gap=Field(200, "Steps between new projections of `galore`", whole(), role=Role.RUN),
    factor_rates=Field(
      "equal",
      "Learning rates of the factors: `equal`, or `fan_in` for up's times D_in / R",
      choice(names="train.optimizer.FACTOR_RATES"),
    ),
    grad_clip_norm=Field(5.0, "Largest norm of the gradient", _FLOAT, "no clipping"),
    ema_decay=Field(0.9999, "Decay of the averaged parameters", number("[0, 1)")),
    ema_power=Field(None, "p in the decay's limit 1 - (1 + s)^-p", number("(0, 10]"), _WARM),
  ),
  **group("regularizer", Role.TUNABLE)(
    frobenius=Field(0.0, "Weight of half the squared norm of down @ up", _WEIGHT),
    nuclear=Field(0.0, "Weight of the nuclear norm of down @ up; an SVD a step", _WEIGHT),
    orthogonality=Field(0.0, "Weight of products of different components of a factor", _WEIGHT),
  ),
  **group("init", Role.RUN)(
    from_=Field(
      "",
      "Trained parameters to start from: a workdir, its checkpoint or a file; `{seed}` is the seed",
      PATH,
    ),
    weights=Field("ema", "Averaged or raw parameters, where there are both", choice("ema", "raw")),
    compression=Field(
      "svd",
      "How dense kernels become factors: by their SVD, or by that `whitened` by the inputs",
      choice(names="model.factors.COMPRESSIONS"),
    ),
    energy=Field(
      None,
      "Share of each kernel's (`whitened`: its outputs') squared norm that the static rank keeps",
      _SHARE,
      "the ranks of the config",
    ),
    whitening_examples=Field(1024, "Training examples in each bucket's second moments", whole()),
    distillation=Field(
      0.0,
      "Weight in the loss of the squared distance from the trained model's output",
      number("[0, 1e30)"),
    ),
  ),
  **group("training", Role.WATCH)(
    batch_size=Field(256, "Examples in a step over all devices", _BATCH, role=Role.RUN),
    microbatch=Field(
      None,
      "Examples in flight over all devices, a divisor of `batch_size`; saves memory",
      _BATCH,
      "the batch",
      role=Role.PROCESS,
    ),
    num_steps=Field(
      100_000,
      "Updates; a larger number prolongs a run, and 0 only reads what `init.from_` names",
      whole(0),
      "those of `num_epochs`",
      role=Role.FREE,
    ),
    num_epochs=Field(
      None,
      "Passes over the training data, instead of `num_steps`, which the command line unsets then",
      whole(),
      "`num_steps` counts",
      role=Role.FREE,
    ),
    log_every_steps=Field(100, "Steps between lines of metrics", whole()),
    eval_every_steps=Field(5000, "Steps between held-out losses", whole(), "never"),
    sample_every_steps=Field(10_000, "Steps between grids of samples", whole(), "never"),
    gradient_norms_every_steps=Field(
      None,
      "Steps between means and variances of single examples' gradient norms by timestep group",
      whole(),
      "never",
    ),
    metrics_every_steps=Field(
      None,
      "Steps between metrics of samples of the averaged weights, by `evaluation.extractors`",
      whole(),
      "never",
    ),
    metrics_samples=Field(1000, "Images that those metrics are over", whole(4)),
    tensorboard=Field(True, "Write TensorBoard events if tensorboard is installed"),
    profile_steps=Field((), "(first, last) steps to trace; () traces none", span(1)),
  ),
  **group("checkpoint", Role.FREE)(
    every_steps=Field(5000, "Steps between checkpoints", whole()),
    keep=Field(2, "Number of newest checkpoints to keep", whole()),
    keep_every=Field(None, "Keep every checkpoint whose step this divides", whole(), "none"),
  ),
  **group("sampling", Role.SAMPLES)(
    num_samples=Field(1000, "Images in a sample set", whole(), role=Role.FREE),
    batch_size=Field(250, "Images in flight over all devices", _BATCH, role=Role.FREE),
    solver=Field("ddim", "Solver", choice(names="diffusion.solvers.SOLVERS")),
    num_steps=Field(50, "Solver steps, at most T", whole()),
    eta=Field(0.0, "Noise of ddim", number("[0, 1]")),
    guidance_scale=Field(1.0, "Scale of classifier-free guidance", number("[0, 1000]")),
    guidance_channels=Field(
      None, "Guide only the first channels; the published DiT has 3", whole(), "all"
    ),
    guidance_min_noise=Field(
      None, "Guide only above this noise level sqrt(1 / alphas_cumprod - 1)", _WEIGHT, "no limit"
    ),
    guidance_max_noise=Field(
      None,
      "Guide only up to this noise level; elsewhere, guidance costs nothing",
      _FLOAT,
      "no limit",
    ),
    clip_x_0=Field(True, "Clip the predicted image to [-1, 1]; for pixels only"),
    seed=Field(0, "Seed of the noise and of random labels", _SEED),
    labels=Field("balanced", "Labels: `balanced`, `random` or a class index"),
    use_ema=Field(
      True, "Use averaged rather than raw parameters, in every mode that reads one set"
    ),
    name=Field("default", "Name of the sample set", rule(_is_name, _NAME), role=Role.FREE),
    png_files=Field(False, "Write a PNG file for each image as well", role=Role.FREE),
  ),
  **group("evaluation", Role.FREE)(
    extractors=Field(
      ("classifier",),
      "Features that samples are compared by; () measures only held-out losses",
      several(names="evaluation.features.EXTRACTORS"),
    ),
    draws=Field(4, "Pairs of noise and timestep for each held-out example", whole()),
    reference_split=Field("train", "Real images to compare with", choice("train", "eval")),
    max_features=Field(10_000, "Images in kernel distance, precision and recall", whole(10)),
    features_dir=Field("", "Directory of the classifier and statistics; empty: the workdir", PATH),
    classifier_steps=Field(None, "Updates of the classifier", whole(), "about 20 epochs"),
    inception_weights=Field("", "Inception's weights; empty: torch-fidelity's", PATH),
  ),
  **group("analysis", Role.FREE)(
    sections=Field(_SECTIONS, "Parts of the analysis", several(*_SECTIONS)),
    batch_sizes=Field((16, 64, 256), "Examples in a gradient; the last above 1", rising(1)),
    subspace_rank=Field(8, "Leading singular vectors of gradients to compare", whole()),
    microbatch=Field(16, "Examples in flight", _BATCH),
    seed=Field(0, "Seed of the gradients' examples, noise and timesteps", _SEED),
    ranks=Field((), "Ranks to truncate all layers to; (): ten shares of the largest", rising(1)),
  ),
  **group("export", Role.FREE)(
    bucket=Field(
      None,
      "Merge factors at this rank bucket to dense kernels",
      whole(0, 999),
      "keep them; the last bucket in the layout of diffusers",
    ),
  ),
  **group("benchmark", Role.FREE)(
    rounds=Field(10, "Rounds that medians are taken over", whole()),
    steps=Field(1, "Steps timed together; more of them hide the time between steps", whole()),
    sampling_runs=Field(1, "Complete sampling runs of each arm", whole(), "sum of bucket times"),
    fit_memory=Field(False, "Halve the batch until all arms fit the accelerator"),
    compile_threads=Field(1, "Programs compiled at once, untimed above 1", whole(1, 1024)),
    optimizers=Field(
      (),
      "Optimizers that the adaptive arm is trained with besides its own",
      several(names="train.optimizer.OPTIMIZERS"),
    ),
    matmul_size=Field(None, "Matrix size for the peak rate", whole(), "2048 on CPUs, else 8192"),
  ),
}


def fields_of(*roles: Role) -> frozenset[str]:
  """Return the names of the fields with one of the roles."""
  return frozenset(name for name, field in FIELDS.items() if field.role in roles)


def get(config: ConfigDict, field: str) -> Any:
  """Return the value of a field named such as "model.depth"."""
  return functools.reduce(getattr, field.split("."), config)


def get_default_config(method: str, variant: str) -> ConfigDict:
  """Return a locked config with all fields at their defaults, for a recipe to change.

  `method` is one of `derive.METHODS`, and `variant` a model size such as "S/2".
  """
  nested: dict[str, Any] = {}
  for name, field in FIELDS.items():
    group, _, key = name.rpartition(".")
    values = nested.setdefault(group, {}) if group else nested
    values[key] = field.default
    if field.none or field.default is None:  # keeps its type while it is None
      values[key] = config_dict.FieldReference(field.default, field_type=field.allowed.kind)
  config = ConfigDict(nested)
  config.method, config.model.variant = method, variant
  return config.lock()


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
  """Return the config.json of any version with this version's fields.

  New fields take their defaults, and zeros that stood for None become None.
  """
  config = {key: dict(v) if isinstance(v, dict) else v for key, v in stored.items()}
  for name, field in FIELDS.items():
    group, _, key = name.rpartition(".")
    values = config.setdefault(group, {}) if group else config
    if isinstance(values, dict):
      default = list(field.default) if isinstance(field.default, tuple) else field.default
      value = values.setdefault(key, default)
      if field.none and value == 0 and name not in NEVER_ZERO:
        values[key] = None
  return config


def parse_arg(arg: str, **allowed: str | tuple[str, ...]) -> dict[str, str]:
  """Parse "key=value,..." for a recipe's `get_config`.

  `allowed` has every key with its default, or with its values, of which the first is the default.
  """
  values = {key: (own,) if isinstance(own, str) else own for key, own in allowed.items()}
  given: dict[str, str] = {}
  for item in arg.split(",") if arg else ():
    key, equals, value = item.partition("=")
    if key in given:
      raise UserError(f"config argument {key} is given twice: leave one out", 2)
    if not equals or key not in values:
      fix = f"after the colon of --config write KEY=VALUE with KEY one of {', '.join(values)}"
      raise UserError(f"config argument {item!r} is unknown: {fix}", 2)
    if value not in values[key] and len(values[key]) > 1:
      raise UserError(f"config argument {item!r}: use one of {', '.join(values[key])}", 2)
    given[key] = value
  return {key: given.get(key, own[0]) for key, own in values.items()}
