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
for name in ("config", "experiment", "benchmark", "run", "__init__", "analysis", "report", "modes"):
  MAY_IMPORT[name] = tuple(MAY_IMPORT)
