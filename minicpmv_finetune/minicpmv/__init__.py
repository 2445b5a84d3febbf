"""The models every step works on: generations, slicing, conversation template, loading and saving."""
