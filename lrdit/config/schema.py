"""Every field and its default; a dataset's config changes what differs.

A field that is not here does not exist: the config is locked, and overriding an
unknown field is an error.
"""

from ml_collections import ConfigDict

from lrdit.runtime.errors import UserError


def parse_arg(arg: str, **defaults: str) -> dict[str, str]:
  """Parses "key=value,..." over `defaults`, which name all keys there are.

  Raises:
    UserError: unknown key, one given twice, or an item without "=".
  """
  values, unset = dict(defaults), set(defaults)
  for item in arg.split(",") if arg else ():
    key, equals, value = item.partition("=")
    if key in values and key not in unset:
      raise UserError(f"config argument {key} is given twice: leave one out", exit_status=2)
    if not equals or key not in values:
      raise UserError(
        f"config argument {item!r} is unknown: after the colon of --config write "
        f"KEY=VALUE with KEY one of {', '.join(values)}",
        exit_status=2,
      )
    values[key] = value
    unset.remove(key)
  return values


def get_default_config(method: str, variant: str) -> ConfigDict:
  """All groups and fields; lengths are in steps, sizes in pixels.

  Args:
    method: full, static or adaptive.
    variant: model size such as "S/2".
  """
  config = ConfigDict()
  config.seed = 0
  config.method = method

  config.data = data = ConfigDict()
  data.name = ""
  data.data_dir = ""
  data.image_size = 0
  data.num_channels = 3
  data.num_classes = 0  # 0: unconditional; fewer than there are: the first ones
  data.flip = False  # mirror left to right, with probability one half
  data.cache_gib = 4.0  # keep decoded images if a split needs at most this
  data.skip_unreadable = False  # own files: leave out what cannot be read

  config.vae = vae = ConfigDict()
  vae.downsample_factor = 0  # 0: the model works on pixels; 8 for Stable Diffusion's
  vae.latent_channels = 4
  vae.path = ""  # diffusers AutoencoderKL: a directory or a safetensors file
  vae.latents_dir = ""  # what --mode=encode wrote; training reads it
  vae.batch_size = 32  # images in flight, over all devices

  config.model = model = ConfigDict()
  model.variant = variant
  # 0 takes the variant's value.
  model.hidden_size = 0
  model.depth = 0
  model.num_heads = 0
  model.patch_size = 0
  model.dtype = "float32"  # compute; or bfloat16. Parameters are float32.
  model.remat = False  # compute blocks again in the backward pass: less memory, more time
  model.scan_blocks = False  # compile equal blocks once: for deep models; slower on CPUs
  model.class_dropout_rate = 0.1
  model.learn_sigma = False

  config.rank = rank = ConfigDict()
  rank.ratio = 0.5  # share of a dense layer's parameters that `static` keeps
  rank.schedule = "logistic_decreasing"  # or measured: of rank.analysis
  rank.min_ratio = 0.4  # measured: from the analysis
  rank.analysis = ""  # measured: analysis/truncation.json of a run after --mode=analyze
  rank.monotone = False  # measured: smooth r(t) so that it nowhere rises
  # What was read from the analysis, which the run keeps: shares of the largest rank in groups
  # of timesteps.
  rank.measured_shares = ()
  rank.measured_boundaries = ()
  rank.match = "activated"  # mean active rank = static rank; or total: max = static
  rank.num_buckets = 4
  rank.multiple_of = 8
  # Above 0: factorise only these blocks, and nothing outside the blocks.
  rank.first_n_blocks = 0
  rank.last_n_blocks = 0
  rank.dense_layers = ("patch_embed", "blocks_0/mlp", "final_layer/linear")
  rank.compute = "grouped"  # or masked, the reference

  config.diffusion = diffusion = ConfigDict()
  diffusion.num_train_timesteps = 1000
  diffusion.noise_schedule = "squaredcos_cap_v2"  # or linear
  diffusion.prediction = "epsilon"  # or v
  diffusion.loss_weighting = "uniform"  # or min_snr

  config.curriculum = curriculum = ConfigDict()
  curriculum.enabled = False
  curriculum.start = "high"  # first group of timesteps; or low, middle
  # Groups [0, 44), [44, 123), ...: the curriculum's, and those of the losses by group in
  # every run's metrics. They end at diffusion.num_train_timesteps; where they do not, a run
  # without a curriculum scales them, and a run with one is refused.
  curriculum.boundaries = (0, 44, 123, 234, 371, 520, 667, 796, 897, 966, 1000)
  curriculum.patience = 5  # checks without a better loss that end a stage
  curriculum.check_every_steps = 1000
  curriculum.restart_optimizer = False  # fresh moments, new warm-up at each stage

  config.optimizer = optimizer = ConfigDict()
  optimizer.name = "adamw"  # or lion
  optimizer.learning_rate = 1e-4
  optimizer.decay = "constant"  # or cosine, after the warm-up
  optimizer.warmup_steps = 3000
  optimizer.weight_decay = 0.0
  optimizer.grad_clip_norm = 5.0  # 0: no clipping
  optimizer.ema_decay = 0.9999

  config.training = training = ConfigDict()
  training.batch_size = 256  # global
  training.num_steps = 100_000
  training.log_every_steps = 100
  training.eval_every_steps = 5000  # held-out loss; 0: never
  training.sample_every_steps = 10_000  # a grid; 0: never
  training.tensorboard = True  # where it can be imported

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 5000
  checkpoint.keep = 2

  config.sampling = sampling = ConfigDict()
  sampling.num_samples = 1000
  sampling.batch_size = 250
  sampling.solver = "ddim"  # ddpm, dpm++; diffusion.solver_timesteps says where they start
  sampling.num_steps = 50
  sampling.eta = 0.0  # noise of ddim
  sampling.guidance_scale = 1.0
  sampling.clip_x_0 = True  # keep x_0 in [-1, 1]: pixels, not latents
  sampling.seed = 0
  sampling.labels = "balanced"  # random, or one class number
  sampling.use_ema = True
  sampling.name = "default"
  sampling.png_files = False

  config.evaluation = evaluation = ConfigDict()
  # By what samples are compared: classifier (trained on the data), inception (FID's), pixel.
  # Empty: held-out losses alone.
  evaluation.extractors = ("classifier",)
  evaluation.draws = 4  # of noise and timestep for each held-out example
  evaluation.reference_split = "train"  # real images to compare with; or eval
  evaluation.max_features = 10_000  # images the kernel distance, precision and recall are over
  evaluation.features_dir = (
    ""  # of the classifier and the real images' statistics; empty: in workdir
  )
  evaluation.classifier_steps = 0  # of training it; 0: about 20 epochs
  evaluation.inception_weights = ""  # a file; empty: torch-fidelity downloads them

  config.analysis = analysis = ConfigDict()
  analysis.sections = ("flops", "weights", "gradients", "truncation")
  analysis.batch_sizes = (16, 64, 256)  # examples that gradients are of, rising
  analysis.subspace_rank = 8  # leading singular vectors of gradients that are compared
  analysis.microbatch = 16  # examples in flight; fewer need less memory
  analysis.seed = 0  # of the gradients' examples, noise and timesteps
  analysis.ranks = ()  # that all layers are cut to, rising; empty: ten shares of the largest

  config.benchmark = benchmark = ConfigDict()
  benchmark.rounds = 10  # medians are over rounds
  # Training steps, and solver steps per bucket, timed together in a round: more
  # than 1 hides the time between steps, as training on an accelerator does.
  benchmark.steps = 1
  benchmark.sampling_runs = 1  # whole sampling runs of each arm; 0: add up bucket times
  benchmark.fit_memory = False  # halve training.batch_size until all arms fit an accelerator
  benchmark.compile_threads = 1  # more: programs are compiled side by side, and not timed
  benchmark.matmul_size = 0  # of the peak's matrices; 0: 2048 on a CPU, 8192 elsewhere
  return config.lock()
