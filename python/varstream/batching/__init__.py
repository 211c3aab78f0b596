"""Batches from documents: bin packing of lengths and collation into packed rows."""
