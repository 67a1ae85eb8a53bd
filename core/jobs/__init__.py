"""Jobs: spec, states, tables, and who may write them."""
