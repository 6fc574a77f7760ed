"""How masks are decided: one file a paper. Methods know no model and no store."""
