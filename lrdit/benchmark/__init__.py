"""How fast each arm trains and samples, beside how fast its FLOPs say it should be."""
