"""The only folder that knows EasyEdit: which one is there, how to load it, and how to take part in it."""
