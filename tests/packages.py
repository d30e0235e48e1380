"""Which package may import which, as docs/design.md has it."""

# Package or module: those above it in the table that it may import, besides its own.
MAY_IMPORT = {
  "runtime": (),
  "rank": ("runtime",),
  "diffusion": ("runtime",),
  "model": ("rank", "runtime"),
  "data": ("model", "runtime"),
  "train": ("data", "model", "rank", "diffusion", "runtime"),
  "sampling": ("data", "model", "diffusion", "runtime"),
  "evaluation": ("data", "runtime"),
}
ALL_ABOVE = ("config", "experiment", "pretrained", "benchmark", "run", "__init__", "analysis")
for name in (*ALL_ABOVE, "report", "modes"):
  MAY_IMPORT[name] = tuple(MAY_IMPORT)
