"""Values that a field cannot have, alone or beside others: one line for each."""

import pytest

from lrdit.config.schema import FIELDS
from tests import tiny
from tests.command_line import (
  CELEBA,
  CIFAR,
  DIGITS,
  assert_one_line,
  assert_tiny_mistake,
  run_in_process,
)

NO_IMAGENET = ("--config.data.data_dir=/nowhere", "--config.sampling.clip_x_0=True")
MEASURED = "--config.rank.schedule=measured"
SHARES = "--config.rank.measured_shares="
BOUNDARIES = "--config.rank.measured_boundaries="

# id: (flags after those of a tiny run, exit status, words of the message). {tmp} holds a file
# `file`.
MISTAKES = {
  "unknown method": ([f"{DIGITS}:method=sparse"], 1, "config.method='sparse' must be one of"),
  "unknown variant": ([f"{DIGITS}:variant=M/2"], 1, "variant='M/2' is unknown"),
  "ratio of zero": (["--config.rank.ratio=0"], 1, "rank.ratio=0.0 must be a number in (0, 1]"),
  "ratio above one": (["--config.rank.ratio=1.5"], 1, "rank.ratio=1.5 must be a number in (0, 1]"),
  "ratio not a number": (
    ["--config.rank.ratio=nan"],
    1,
    "rank.ratio=nan must be a number in (0, 1]",
  ),
  "floor above one": (
    ["--config.rank.min_ratio=2"],
    1,
    "rank.min_ratio=2.0 must be a number in (0, 1]",
  ),
  "unknown schedule": (["--config.rank.schedule=up"], 1, "rank.schedule='up' must be one of"),
  "unknown match": (["--config.rank.match=none"], 1, "rank.match='none' must be one of"),
  "unknown compute": (["--config.rank.compute=fast"], 1, "rank.compute='fast' must be one of"),
  "no buckets": (
    ["--config.rank.num_buckets=0"],
    1,
    "rank.num_buckets=0 must be a whole number from 1 to 1000",
  ),
  "multiple of zero": (
    ["--config.rank.multiple_of=0"],
    1,
    "rank.multiple_of=0 must be a whole number from 1",
  ),
  "multiple above the rank": (["--config.rank.multiple_of=64"], 1, "multiple_of=64 is above"),
  "unknown dense layer": (['--config.rank.dense_layers=("mlp",)'], 1, "'mlp' fits no layer"),
  "more blocks than there are": (["--config.rank.first_n_blocks=9"], 1, "rank.first_n_blocks=9"),
  "unknown dataset": (["--config.data.name=mnist"], 1, "data.name='mnist' must be one of"),
  "layers that are no names": (["--config.rank.dense_layers=(1,2)"], 1, "must be names of layers"),
  "no layer left": (['--config.rank.dense_layers=("*",)'], 1, "leaves no layer to factorize"),
  "ranks of other layers": (["--config.rank.layer_ranks=(8,)"], 1, "must be the ranks of"),
  "energy of nothing": (
    ["--config.init.energy=0.9"],
    1,
    "init.energy=0.9 needs trained parameters",
  ),
  "mean that cannot be met": (["--config.rank.ratio=1"], 1, "rank.match=activated cannot be met"),
  "rate beyond float32": (["--config.optimizer.learning_rate=1e39"], 1, "(1e-37, 1e30)"),
  "noise of another solver": (
    ["--config.sampling.solver=dpm++", "--config.sampling.eta=0.5"],
    1,
    "eta=0.5 applies only to ddim",
  ),
  "image of another size": (["--config.data.image_size=16"], 1, "data.image_size=16 does not fit"),
  "directory nobody reads": (["--config.data.data_dir=x"], 1, "data.data_dir='x' does not fit"),
  "odd image size": (["--config.data.image_size=7"], 1, "image_size=7 is not a multiple of"),
  "more classes than there are": (
    ["--config.data.num_classes=11"],
    1,
    "data.num_classes=11 does not",
  ),
  "other channels": (["--config.data.num_channels=3"], 1, "data.num_channels=3 does not fit"),
  "patch that does not divide": (["--config.model.patch_size=3"], 1, "not a multiple of"),
  "heads that do not divide": (
    ["--config.model.num_heads=3"],
    1,
    "hidden_size=32 is not a multiple",
  ),
  "width not in four parts": (["--config.model.hidden_size=34"], 1, "must be a multiple of 4"),
  "negative depth": (
    ["--config.model.depth=-1"],
    1,
    "model.depth=-1 must be a whole number from 1 to 10000, or None",
  ),
  "unknown dtype": (["--config.model.dtype=float16"], 1, "model.dtype='float16' must be one of"),
  "drop rate above one": (["--config.model.class_dropout_rate=1.1"], 1, "class_dropout_rate=1.1"),
  "unknown noise": (
    ["--config.diffusion.noise_schedule=cos"],
    1,
    "noise_schedule='cos' must be one of",
  ),
  "unknown prediction": (["--config.diffusion.prediction=x0"], 1, "prediction='x0' must be one of"),
  "unknown weighting": (["--config.diffusion.loss_weighting=p2"], 1, "loss_weighting='p2'"),
  "unknown optimiser": (["--config.optimizer.name=sgd"], 1, "optimizer.name='sgd' must be one of"),
  "no learning rate": (
    ["--config.optimizer.learning_rate=0"],
    1,
    "must be a number in (1e-37, 1e30)",
  ),
  "endless average": (
    ["--config.optimizer.ema_decay=1"],
    1,
    "ema_decay=1.0 must be a number in [0, 1)",
  ),
  "negative clipping": (
    ["--config.optimizer.grad_clip_norm=-1"],
    1,
    "grad_clip_norm=-1.0 must be",
  ),
  "unknown start": (["--config.curriculum.start=top"], 1, "curriculum.start='top' must be one of"),
  "no patience": (
    ["--config.curriculum.patience=0"],
    1,
    "patience=0 must be a whole number from 1",
  ),
  "no checks": (["--config.curriculum.check_every_steps=0"], 1, "check_every_steps=0 must be a"),
  "groups from elsewhere": (["--config.curriculum.boundaries=(1,1000)"], 1, "must start at 0"),
  "groups that fall": (["--config.curriculum.boundaries=(0,9,9,1000)"], 1, "must rise"),
  "one boundary": (["--config.curriculum.boundaries=(0,)"], 1, "must be two or more whole numbers"),
  "broken boundary": (["--config.curriculum.boundaries=(0,0.5,1)"], 1, "or more whole numbers"),
  "groups that end early": (
    ["--config.curriculum.boundaries=(0,50,100)", "--config.curriculum.enabled=True"],
    1,
    "must end at config.diffusion.num_train_timesteps=1000: use (0, 500, 1000)",
  ),
  "zero steps": (
    ["--config.training.num_steps=0"],
    1,
    "training.num_steps=0 needs trained parameters: set config.init.from_",
  ),
  "zero batch": (
    ["--config.training.batch_size=0"],
    1,
    "training.batch_size=0 must be a whole number from 1 to 1048576",
  ),
  "batch over devices": (
    ["--config.training.batch_size=6"],
    1,
    "6 is not divisible by the 4 devices",
  ),
  "no checkpoint kept": (
    ["--config.checkpoint.keep=0"],
    1,
    "checkpoint.keep=0 must be a whole number from 1",
  ),
  "unknown solver": (
    ["--config.sampling.solver=euler"],
    1,
    "sampling.solver='euler' must be one of",
  ),
  "zero solver steps": (
    ["--config.sampling.num_steps=0"],
    1,
    "sampling.num_steps=0 must be a whole number from 1",
  ),
  "too many solver steps": (["--config.sampling.num_steps=2000"], 1, "must lie in [1, 1000]"),
  "no samples": (
    ["--config.sampling.num_samples=0"],
    1,
    "num_samples=0 must be a whole number from 1",
  ),
  "eta above one": (["--config.sampling.eta=2"], 1, "sampling.eta=2.0 must be a number in [0, 1]"),
  "guidance without classes": (
    ["--config.data.num_classes=0", "--config.sampling.guidance_scale=2"],
    1,
    "guidance_scale=2.0 needs classes",
  ),
  "guidance without a null class": (
    ["--config.model.class_dropout_rate=0", "--config.sampling.guidance_scale=2"],
    1,
    "needs a null class",
  ),
  "guidance of more channels than there are": (
    ["--config.sampling.guidance_channels=3"],
    1,
    "guidance_channels=3 must be at most 1, the channels there are",
  ),
  "a guidance interval that falls": (
    ["--config.sampling.guidance_min_noise=2", "--config.sampling.guidance_max_noise=0.5"],
    1,
    "guidance_min_noise=2.0 must be at most config.sampling.guidance_max_noise=0.5",
  ),
  "no end of training": (
    ["--config.training.num_steps=None"],
    1,
    "training.num_steps=None beside config.training.num_epochs=None: set one of them",
  ),
  "middle group of another start": (
    ["--config.curriculum.middle_group=0"],
    1,
    "middle_group=0 is not used by config.curriculum.start='high'",
  ),
  "middle group that is not there": (
    ["--config.curriculum.middle_group=10", "--config.curriculum.start=middle"],
    1,
    "middle_group=10 must be below 10",
  ),
  "last stage without a rate": (
    ["--config.curriculum.learning_rate_decay=0.1", "--config.curriculum.enabled=True"],
    1,
    "learning_rate_decay=0.1 leaves no learning rate to the last",
  ),
  "negative guidance": (["--config.sampling.guidance_scale=-1"], 1, "guidance_scale=-1.0 must be"),
  "unknown label": (["--config.sampling.labels=10"], 1, "sampling.labels='10' is unknown"),
  "unknown label rule": (["--config.sampling.labels=all"], 1, "use balanced, random or 0 to 9"),
  "name with a slash": (["--config.sampling.name=../x"], 1, "must be the name of a directory"),
  "training on no latents": (
    ["--config=configs/celeba.py"],
    1,
    "config.vae.latents_dir=''",
  ),
  "latents cut to pixels": (
    ["--config=configs/celeba.py", "--config.sampling.clip_x_0=True"],
    1,
    "sampling.clip_x_0=True would cut latents",
  ),
  "image that the VAE does not divide": (
    ["--config=configs/celeba.py", "--config.data.image_size=100"],
    1,
    "data.image_size=100 is not a multiple of config.vae.downsample_factor=8",
  ),
  "latents that the patch does not divide": (
    ["--config=configs/celeba.py", "--config.data.image_size=24"],
    1,
    "(3 latent pixels) is not a multiple of",
  ),
  "no CIFAR-10": (
    ["--config=configs/cifar10.py", "--config.data.data_dir=/nowhere"],
    1,
    "tfds.builder('cifar10', data_dir='/nowhere', file_format='array_record').download_and",
  ),
  "no ImageNet": (
    ["--config=configs/imagenet128.py", "--config.vae.downsample_factor=None", *NO_IMAGENET],
    1,
    "put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (both from",
  ),
  "own images nowhere": (
    ["--config=configs/cifar10.py", "--config.data.name=folder"],
    1,
    "data_dir",
  ),
  "negative cache": (
    ["--config.data.cache_gib=-1"],
    1,
    "data.cache_gib=-1.0 must be a number in [0, 1e6]",
  ),
  # Combinations of fields.
  "measured without an analysis": ([MEASURED], 1, "rank.analysis='' is missing"),
  "analysis that is nowhere": (
    [MEASURED, "--config.rank.analysis={tmp}/none"],
    1,
    "none' does not exist",
  ),
  "analysis that is text": ([MEASURED, "--config.rank.analysis={tmp}/file"], 1, "not an analysis"),
  "analysis that nothing reads": (["--config.rank.analysis=x"], 1, "needs rank.schedule=measured"),
  "shares that nothing reads": ([f"{SHARES}(1,)"], 1, "needs rank.schedule=measured"),
  "boundaries that nothing reads": ([f"{BOUNDARIES}(0,9)"], 1, "needs rank.schedule=measured"),
  "measured at equal size": ([MEASURED, "--config.rank.match=total"], 1, "must be activated with"),
  "shares above one": (
    [MEASURED, f"{SHARES}(0.5,2)", f"{BOUNDARIES}(0,500,1000)"],
    1,
    "must be numbers in (0, 1]",
  ),
  "shares that are words": (
    [MEASURED, f"{SHARES}('x',1)", f"{BOUNDARIES}(0,500,1000)"],
    1,
    "must be numbers in (0, 1]",
  ),
  "fewer boundaries than shares": (
    [MEASURED, f"{SHARES}(0.5,1)", f"{BOUNDARIES}(0,500)"],
    1,
    "must rise from 0 to 1000 and be one more than",
  ),
  "shares without boundaries": ([MEASURED, f"{SHARES}(0.5,1)"], 1, "measured_boundaries=() must"),
  "fewer timesteps than solver steps": (
    ["--config.diffusion.num_train_timesteps=5"],
    1,
    "num_steps=10 must lie in [1, 5]",
  ),
  "one timestep": (["--config.diffusion.num_train_timesteps=1"], 1, "num_train_timesteps=1 must"),
  "no groups": (["--config.curriculum.boundaries=()"], 1, "boundaries=() must be two or more"),
  "blocks before the first": (["--config.rank.last_n_blocks=-1"], 1, "last_n_blocks=-1 must be"),
  "model too narrow for its rank": (
    ["--config.model.hidden_size=4"],
    1,
    "is above the static rank",
  ),
  "noise of ddpm": (
    ["--config.sampling.solver=ddpm", "--config.sampling.eta=1"],
    1,
    "eta=1.0 applies only to ddim",
  ),
  "latents that clip": ([CELEBA, "--config.sampling.clip_x_0=true"], 1, "would cut latents"),
  "guidance without end": (["--config.sampling.guidance_scale=1001"], 1, "in [0, 1000]"),
  "labels that are a fraction": (["--config.sampling.labels=3.0"], 1, "labels='3.0' is unknown"),
  "labels in a list": (["--config.sampling.labels=0,1"], 1, "labels='0,1' is unknown"),
  "labels below the first": (["--config.sampling.labels=-1"], 1, "labels='-1' is unknown"),
  "no labels": (["--config.sampling.labels="], 1, "labels='' is unknown"),
  "sample set without a name": (["--config.sampling.name="], 1, "must be the name of a directory"),
  "sample set with a line end": (["--config.sampling.name=a\nb"], 1, "printable characters"),
  "sample set with too long a name": (
    [f"--config.sampling.name={'x' * 300}"],
    1,
    "at most 100 printable characters",
  ),
  "rate that is 0 in float32": (["--config.optimizer.learning_rate=1e-40"], 1, "(1e-37, 1e30)"),
  "clipping that is 0 in float32": (
    ["--config.optimizer.grad_clip_norm=1e-40"],
    1,
    "(1e-37, 1e30)",
  ),
  "decay beyond float32": (
    ["--config.optimizer.weight_decay=1e39"],
    1,
    "must be a number in [0, 1e30)",
  ),
  "cache beyond any machine": (["--config.data.cache_gib=1e300"], 1, "cache_gib=1e+300 must be"),
  "a zero for never": (
    ["--config.training.eval_every_steps=0"],
    1,
    "eval_every_steps=0 must be a whole number from 1 to 2**31 - 1, or None (never)",
  ),
  "one number for steps to profile": (
    ["--config.training.profile_steps=(3,)"],
    1,
    "profile_steps=(3,) must be () or (first, last), 1 <= first <= last",
  ),
  "step 0 to profile": (["--config.training.profile_steps=(0, 3)"], 1, "1 <= first <= last"),
  "steps to profile that fall": (["--config.training.profile_steps=(3, 2)"], 1, "first <= last"),
  "a dry run of what cannot be": (["--dry_run", "--config.model.num_heads=3"], 1, "not a multiple"),
  "a dry run without data": (
    [CIFAR, "--dry_run", "--config.data.data_dir=/nowhere"],
    1,
    "tfds.builder('cifar10'",
  ),
}

# What no field of a type can be. Strings, and the elements of tuples, have rules of their own.
NEVER = {
  float: ("nan", "inf", "-inf", "-1", "1e400", "", "x"),
  int: ("-99999999999999999999", "99999999999999999999", "2147483648.5", "nan", "", "x"),
  bool: ("maybe", "2", ""),
}
NEVER_BY_FIELD = {
  name: NEVER[field.allowed.kind if field.default is None else type(field.default)]
  for name, field in FIELDS.items()
  if type(field.default) not in (str, tuple)
}


@pytest.mark.parametrize(("flags", "status", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_value_ends_in_one_line(flags, status, words, tmp_path, capsys, monkeypatch):
  (tmp_path / "file").write_text("words\n")
  assert_tiny_mistake(capsys, monkeypatch, flags, status, words, tmp_path)


@pytest.mark.parametrize("field", NEVER_BY_FIELD)
def test_what_no_field_of_the_type_can_be(field, tmp_path, capsys, monkeypatch):
  for value in NEVER_BY_FIELD[field]:
    argv = tiny.command(tmp_path / "run", f"--config.{field}={value}")[2:]
    status = 2 if value in ("", "x", "maybe", "2") or value.endswith(".5") else None
    got, stderr = run_in_process(capsys, monkeypatch, argv)
    assert status in (None, got)
    assert_one_line(got, got if got in (1, 2) else 1, stderr, field.rpartition(".")[2])
    assert not (tmp_path / "run").exists()
