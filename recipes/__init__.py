"""Recipe files that ship with ptq4dit_ao; see ``ptq4dit_ao.recipe.shipped_recipes``."""
