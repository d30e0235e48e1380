"""One experiment: everything that a resolved config describes, each part made once."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from lrdit.config import derive, sample_settings
from lrdit.config.checks import INT32_MAX, require
from lrdit.config.schema import get
from lrdit.data import images, latents, pipeline
from lrdit.data.source import DataOptions, Source
from lrdit.evaluation import classifier, efficientnet, features, inception
from lrdit.model import dit, flops, vae, vae_weights
from lrdit.rank.plan import dense_plan
from lrdit.rank.strata import independent, uniform_strata
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.sampling.sampler import Sampler, SamplerSettings, guided_steps
from lrdit.train import loss, step
from lrdit.train.curriculum import Curriculum, make_stages, stage_order
from lrdit.train.muon import MuonOptions, newton_schulz_macs
from lrdit.train.optimizer import Schedule, learning_rate_schedule, make_optimizer
from lrdit.train.state import TrainState, create_train_state
from lrdit.train.step import PROJECTION_LOSS

log = logging.getLogger("lrdit")

ToPixels = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # of `Experiment.to_pixels`
T = TypeVar("T")


def _derived(function: Callable[[ConfigDict], T]) -> functools.cached_property[T]:
  return functools.cached_property(lambda self: function(self.config))


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """What a config describes; properties are computed at their first use and kept.

  Raises:
    UserError: the config has no rank plan, or its optimizer's layers or solver do not fit it.
  """

  config: ConfigDict  # from `config.resolve.resolve`; it must not change
  _vaes: dict[Any, vae.VaeRunner] = dataclasses.field(default_factory=dict)  # of `vae_runner`

  def __post_init__(self):
    """Compute what raises where fields do not fit each other."""
    _ = self.shape, self.plan, self.muon_options, self.solver_table

  def with_config(self, config: ConfigDict) -> "Experiment":
    """Return the experiment of another config on the same data, with this one's loaded VAEs."""
    return dataclasses.replace(self, config=config.lock())

  # The model.

  shape = _derived(derive.model_shape)
  factorized_layers = _derived(derive.factorized_layers)
  plan = _derived(derive.rank_plan)

  @property
  def dtype(self) -> Any:
    """The dtype of the products' operands; parameters are float32."""
    return getattr(jnp, self.config.model.dtype)

  def model(self, devices: parallel.Devices = ()) -> dit.DiT:
    """Return the DiT, with what the devices compute fastest."""
    m = self.config.model
    attention = dit.choose_attention(devices, self.dtype, self.shape.head_size)
    activation_dtype = dit.choose_activation_dtype(devices, self.dtype)
    settings = {name: m[name] for name in ("remat", "scan_blocks", "frequency_shift")}
    return dit.DiT(
      self.shape, self.plan, self.dtype, activation_dtype, attention=attention, **settings
    )

  def dense_model(self, devices: parallel.Devices = ()) -> dit.DiT:
    """Return the DiT of the same sizes without factors, such as a teacher."""
    return self.model(devices).clone(plan=dense_plan(self.plan.num_train_timesteps))

  def initial_params(self) -> Any:
    """Return initial float32 parameters, which the seed determines."""
    return dit.init_params(self.model(), jax.random.key(self.config.seed))

  @functools.cached_property
  def params_template(self) -> Any:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(self.initial_params)

  # Training.

  alphas_cumprod = _derived(derive.alphas_cumprod)

  @functools.cached_property
  def curriculum(self) -> Curriculum:
    """The stages of training; without a curriculum, a single one over all timesteps."""
    c = self.config.curriculum
    order = stage_order(c.start, len(c.boundaries) - 1, c.middle_group) if c.enabled else ()
    stages = make_stages(c.boundaries, order, self.config.training.batch_size)
    if self.config.diffusion.timesteps == "iid":
      stages = tuple(dataclasses.replace(s, strata=independent(s.strata)) for s in stages)
    names = ("patience", "check_every_steps", "restart_optimizer", "restart_decay")
    fields = {name: c[name] for name in (*names, "warmup_ratio", "learning_rate_decay")}
    return Curriculum(boundaries=c.boundaries, stages=stages, **fields)

  @functools.cached_property
  def muon_options(self) -> MuonOptions:
    """The options of Muon; without layers where the optimizer is another."""
    o = self.config.optimizer
    names = ("momentum", "newton_schulz_steps", "consistent_rms", "learning_rate_ratio")
    fields = {name: o[f"muon_{name}"] for name in names}
    layers = derive.muon_layers(self.config)
    return MuonOptions(layers, **fields, factor_update=o.factor_update)

  @property
  def update_macs(self) -> int:
    """The MACs of the optimizer's matrix products in an update on one device; Muon's alone."""
    shapes = dit.layer_shapes(self.shape)
    return newton_schulz_macs(shapes, self.plan, self.muon_options)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer, for a learning rate of 1."""
    o = self.config.optimizer
    names = ("name", "weight_decay", "grad_clip_norm", "beta1", "beta2", "epsilon", "factor_rates")
    names += ("galore_rank", "galore_gap")
    return make_optimizer(
      **{name: o[name] for name in names}, plan=self.plan, muon=self.muon_options
    )

  def learning_rate(self, stage: int) -> Schedule:
    """Return the learning rate of a curriculum stage, for `train_step`."""
    o, curriculum = self.config.optimizer, self.curriculum
    peak = curriculum.peak(stage, o.learning_rate)
    warmup_steps = curriculum.warmup_steps(stage, o.warmup_steps)
    # The run's own decay begins where its first warm-up ends, whatever the stage.
    decay_after = warmup_steps if curriculum.restart_decay else o.warmup_steps
    num_steps = self.config.training.num_steps
    return learning_rate_schedule(peak, warmup_steps, num_steps, o.decay, decay_after)

  def for_examples(self, num_examples: int) -> "Experiment":
    """Return the experiment on so many training examples, with `num_epochs` as `num_steps`.

    Raises:
      UserError: the epochs are less than one step or too many.
    """
    t = self.config.training
    if t.num_epochs is None:
      return self
    num_steps = t.num_epochs * num_examples // t.batch_size
    rule = (
      f"of {num_examples} examples are {num_steps} steps of {t.batch_size}, and must be from 1 "
    )
    fits = 0 < num_steps <= INT32_MAX
    require(fits, "training.num_epochs", t.num_epochs, f"{rule}to {INT32_MAX}")
    config = ConfigDict(self.config.to_dict())
    config.training.num_steps, config.training.num_epochs = num_steps, None
    return self.with_config(config)

  def objective(self, devices: parallel.Devices) -> loss.Objective:
    """Return the training objective, with its batch spread over `devices`."""
    config, batch_size = self.config, self.config.training.batch_size
    parallel.check_divisible("config.training.batch_size", batch_size, devices)
    microbatch = config.training.microbatch or batch_size
    parallel.check_divisible("config.training.microbatch", microbatch, devices)
    return loss.Objective(
      model=self.model(devices),
      alphas_cumprod=self.alphas_cumprod,
      prediction=config.diffusion.prediction,
      loss_weighting=config.diffusion.loss_weighting,
      min_snr_gamma=config.diffusion.min_snr_gamma,
      class_dropout_rate=config.model.class_dropout_rate,
      compute=config.rank.compute,
      strata=uniform_strata(batch_size, config.diffusion.num_train_timesteps),
      num_devices=len(devices),
      microbatches=batch_size // microbatch,
      variance_floor=config.diffusion.variance_floor,
    )

  @property
  def regularizers(self) -> tuple[tuple[str, float], ...]:
    """The (name, weight) of the penalties on the factors; () for a dense arm."""
    weights = self.config.regularizer.to_dict().items() if self.plan.layers else ()
    return tuple((name, weight) for name, weight in weights if weight)

  def fresh_state(self, params: Any) -> TrainState:
    """Return the state of training before the first update of the parameters."""
    extra = [f"penalty_{name}" for name, _ in self.regularizers]
    extra += [PROJECTION_LOSS] if self.config.optimizer.name == "galore" else []
    return create_train_state(params, self.optimizer, self.curriculum.num_groups, extra)

  def train_step(
    self, devices: parallel.Devices, stage: int, teacher: dit.DiT | None = None
  ) -> Callable:
    """Return the pmapped step of a curriculum stage, which donates its state.

    With a teacher, it distills from it, and takes its replicated parameters as a fourth argument.
    """
    fields = dict(teacher=teacher, distillation=self.config.init.distillation)
    train_step = functools.partial(
      step.train_step,
      objective=dataclasses.replace(self.objective(devices), **fields),
      optimizer=self.optimizer,
      learning_rate=self.learning_rate(stage),
      curriculum=self.curriculum,
      regularizers=self.regularizers,
      stage=stage,
      ema_decay=self.config.optimizer.ema_decay,
      ema_power=self.config.optimizer.ema_power,
      log_every_steps=self.config.training.log_every_steps,
    )
    num_more = 0 if teacher is None else 1
    return parallel.pmap(train_step, devices, donate_argnums=(0,), num_more=num_more)

  def gradient_norms(self, devices: parallel.Devices, stage: int) -> Callable:
    """Return the pmapped gradient norms of single examples on a curriculum stage's timesteps."""
    objective = self.objective(devices).with_strata(self.curriculum.stages[stage].strata)
    fixed = dict(objective=objective, boundaries=self.curriculum.boundaries)
    return parallel.pmap(functools.partial(step.gradient_norms, **fixed), devices)

  @functools.cached_property
  def _eval_steps(self) -> dict[Any, Callable]:
    """Those made so far. Jax never frees a pmapped function, so that another one costs memory."""
    return {}

  def eval_step(self, devices: parallel.Devices, model: dit.DiT | None = None) -> Callable:
    """Return the pmapped evaluation step of a model, by default the arm's own.

    It is for `held_out.held_out_losses`, and is made once for the same arguments.
    """
    key = tuple(devices), model
    if key not in self._eval_steps:
      objective, boundaries = self.objective(devices), self.curriculum.boundaries
      objective = dataclasses.replace(objective, model=model or objective.model)
      fixed = dict(objective=objective.without_augmentation(), boundaries=boundaries)
      self._eval_steps[key] = parallel.pmap(functools.partial(step.eval_step, **fixed), devices)
    return self._eval_steps[key]

  # Sampling.

  solver_table = _derived(derive.solver_table)
  label_rule = _derived(sample_settings.label_rule)

  @functools.cached_property
  def num_passes(self) -> Int[np.ndarray, " S"]:
    """The model's passes over an image at every solver step: 2 where guided, else 1."""
    s, classes = self.config.sampling, self.shape.num_classes
    guidance = s.guidance_scale, s.guidance_min_noise, s.guidance_max_noise
    return 1 + guided_steps(self.solver_table, classes, *guidance)

  @property
  def sampling_macs(self) -> int:
    """The MACs of sampling one image."""
    return flops.sampling_macs(self.shape, self.plan, self.solver_table.t, self.num_passes)

  def sampler(self, devices: parallel.Devices, batch_size: int | None = None) -> Sampler:
    """Return the sliced sampler; `batch_size` replaces the config's."""
    fields = self.config.sampling.to_dict() | {"prediction": self.config.diffusion.prediction}
    fields["batch_size"] = batch_size or fields["batch_size"]
    parallel.check_divisible("config.sampling.batch_size", fields["batch_size"], devices)
    names = [field.name for field in dataclasses.fields(SamplerSettings)]
    settings = SamplerSettings(**{name: fields[name] for name in names})
    return Sampler(self.model(devices), self.solver_table, settings, devices)

  def sample_settings(self, step: int, digest: str, vae_digest: str) -> dict[str, Any]:
    """Return the settings that, with its index, determine a sample, as JSON.

    The digests are `checkpoints.digest` of the weights of the checkpoint `step`, and that of the
    decoding VAE or "".
    """
    config, plan, t = self.config, self.plan, self.solver_table.t
    steps = np.bincount(plan.bucket_of_timestep[t], minlength=plan.num_buckets)
    return sample_settings.to_record(config) | {
      "checkpoint_step": step,
      "checkpoint_digest": digest,
      "method": config.method,
      "first_timestep": int(t[0]),
      "dtype": config.model.dtype,
      "prediction": config.diffusion.prediction,
      "noise_schedule": config.diffusion.noise_schedule,
      "num_train_timesteps": config.diffusion.num_train_timesteps,
      "rank_table": {name: list(ranks.active) for name, ranks in plan.layers},
      "solver_steps_per_bucket": steps.tolist(),
      "vae_digest": vae_digest or None,
    }

  def vae_runner(self, devices: parallel.Devices) -> vae.VaeRunner:
    """Return the VAE at `vae.path`, which is loaded once for the same devices.

    Raises:
      UserError: it is missing or does not fit.
    """
    path, factor = self.config.vae.path, self.config.vae.downsample_factor
    rule = "makes a model on pixels: use a config with latents, or set it to the VAE's (8)"
    require(bool(factor), "vae.downsample_factor", factor, rule)
    rule = "must name the VAE, a diffusers directory or safetensors file (only training with "
    rule += "config.training.sample_every_steps=None needs none)"
    require(bool(path), "vae.path", path, rule)
    if (key := (path, tuple(devices), self.config.vae.batch_size)) in self._vaes:
      return self._vaes[key]
    read = vae_weights.read_vae(os.path.expanduser(path))
    found = {
      "vae.downsample_factor": read.config.downsample_factor,
      "vae.latent_channels": read.config.latent_channels,
      "data.num_channels": read.config.in_channels,
    }
    for field, value in found.items():
      asked = get(self.config, field)
      require(asked == value, field, asked, f"does not fit the VAE: use {value}")
    return self._vaes.setdefault(key, vae.VaeRunner(read, devices, self.config.vae.batch_size))

  def to_pixels(self, devices: parallel.Devices, vae_digest: str) -> ToPixels:
    """Return a function from the model's (B, H, W, C) samples to (pixels, are_finite).

    The pixels are (B, height, width, channels) uint8. They mean nothing where the (B,) bool
    `are_finite` is False. `vae_digest` is the digest of the VAE that made the run's latents, or ""
    for a model on pixels.

    Raises:
      UserError: the VAE is missing, or another one.
    """
    if not self.config.vae.downsample_factor:
      return lambda x_0: (images.to_uint8(x_0), images.are_finite(x_0))
    runner = self.vae_runner(devices)
    rule = f"is another VAE (digest {runner.digest[:12]}) than the one that made the latents "
    rule += f"({vae_digest[:12]})"
    require(runner.digest == vae_digest, "vae.path", self.config.vae.path, rule)

    def decode(x_0: Float[np.ndarray, "B H W C"]) -> tuple[np.ndarray, np.ndarray]:
      decoded = runner.decode(vae.unscale_latents(runner.config, x_0))
      return images.to_uint8(decoded), images.are_finite(x_0) & images.are_finite(decoded)

    return decode

  # Data and evaluation.

  @property
  def _data_options(self) -> DataOptions:
    data = self.config.data
    cache_bytes = int(data.cache_gib * 2**30)
    return DataOptions(
      data.data_dir, data.image_size, data.num_channels, cache_bytes, data.skip_unreadable
    )

  def image_source(self, split: str) -> Source:
    """Return the images of the "train" or "eval" split."""
    source = pipeline.make_source(self.config.data.name, split, self._data_options)
    return self._with_classes(source)

  def source(self, split: str) -> Source:
    """Return the model's training data: images, or their latents.

    Raises:
      UserError: the data is missing, or does not fit the config.
    """
    if not self.config.vae.downsample_factor:
      return self.image_source(split)
    if self.config.vae.encode_on_the_fly:
      runner = self.vae_runner(parallel.all_devices())
      return latents.encode_on_the_fly(self.image_source(split), runner)
    directory, shape = os.path.expanduser(self.config.vae.latents_dir), self.shape
    fix = "make it by --mode=encode --output=DIR --config.vae.path=VAE"
    rule = f"must name the directory that --mode=encode wrote: {fix}"
    require(bool(directory), "vae.latents_dir", directory, rule)
    source = latents.open_latents(directory, split)
    self._check_origin(source, split)
    expected = (shape.image_size, shape.image_size, shape.channels)
    if source.image_shape != expected:
      fix = "set config.vae.downsample_factor and latent_channels to the VAE's"
      found = f"have the shape {source.image_shape}, not {expected}"
      raise UserError(f"the latents under {directory} {found}: {fix}")
    if self.config.data.flip and source.images.shape[1] == 1:
      fix = "encode again with config.data.flip=True, or train with False"
      cause = f"needs latents of the mirrored images, and {directory} has none"
      raise UserError(f"config.data.flip=True {cause}: {fix}")
    return self._with_classes(source)

  def _with_classes(self, source: Source) -> Source:
    """Return the source restricted to the config's first classes."""
    field, wanted, name = "data.num_classes", self.config.data.num_classes, self.config.data.name
    fix = ", which has no labels: use 0"
    if source.num_classes:
      fix = f": use {source.num_classes}, fewer for the first ones, or 0 for no labels"
    rule = f"does not fit the data {name!r}{fix}"
    require(wanted <= source.num_classes, field, wanted, rule)
    if wanted in (0, source.num_classes):
      return source
    kept = source.first_classes(wanted)
    rule = f"leaves none of the {len(source)} images of a split of {name!r}: use more"
    require(len(kept) > 0, field, wanted, rule)
    log.info("%d of %d images are of the first %d classes", len(kept), len(source), wanted)
    return kept

  def _check_origin(self, source: latents.LatentSource, split: str) -> None:
    """Raise a UserError for latents of other images than the config's.

    The images are read only if `data.data_dir` exists, as training on latents needs none.
    """
    data = self.config.data
    loader = pipeline.LOADERS[data.name]

    def compare(expected: dict[str, Any]) -> None:
      for field, value in expected.items():
        if (found := source.fingerprint.get(field)) != value:
          raise UserError(
            f"the latents under {self.config.vae.latents_dir} are of other images: {field} is "
            f"{found!r} there and {value!r} here; encode again, with another --output"
          )

    # These need no data and come first, as another dataset's loader would reject `data_dir`.
    compare({"name": data.name, "crop": images.crop_name(loader.crop_size, data.image_size)})
    if data.data_dir and os.path.exists(os.path.expanduser(data.data_dir)):
      expected = loader.fingerprint(split, self._data_options)
      if "num_classes" in source.fingerprint:  # latents of the first classes only
        expected.pop("num_examples", None)
      compare(expected)
    elif data.data_dir:
      log.warning("the latents are not compared with their images: no %s", data.data_dir)

  def extractors(self, directory: pathlib.Path) -> list[features.Extractor]:
    """Return the feature extractors of the config, with the classifier kept in `directory`."""
    e, data = self.config.evaluation, self.config.data
    make = {
      "pixel": lambda: features.PixelExtractor(data.image_size, data.num_channels),
      "classifier": lambda: self._classifier(directory),
      "efficientnet": efficientnet.open_efficientnet,
      "inception": lambda: inception.open_inception(e.inception_weights),
    }
    return [make[name]() for name in e.extractors]

  def _classifier(self, directory: pathlib.Path) -> classifier.ClassifierExtractor:
    """Return the classifier kept in a directory, or train it first."""
    train, held_out = self.image_source("train"), self.image_source("eval")
    default = classifier.default_num_steps(len(train), classifier.ClassifierSettings.batch_size)
    num_steps = self.config.evaluation.classifier_steps or default
    # The seed is not the run's, as runs that are compared share the classifier.
    settings = classifier.ClassifierSettings(0, num_steps, flip=self.config.data.flip)
    return classifier.open_classifier(directory, train, held_out, settings)
