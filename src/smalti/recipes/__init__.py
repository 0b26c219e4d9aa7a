"""Recipes: one YAML file says all that a system is trained with, from data to output folder. It is checked before
anything runs."""

from smalti.recipes.load import claim_folder as claim_folder
from smalti.recipes.load import load_recipe as load_recipe
from smalti.recipes.load import shipped_recipes as shipped_recipes
from smalti.recipes.schema import AnyRecipe as AnyRecipe
from smalti.recipes.schema import CaptionsRecipe as CaptionsRecipe
from smalti.recipes.schema import ClassesRecipe as ClassesRecipe
from smalti.recipes.schema import DigitsData as DigitsData
from smalti.recipes.schema import ImageTokenizer as ImageTokenizer
from smalti.recipes.schema import LinesRecipe as LinesRecipe
from smalti.recipes.schema import OfScenes as OfScenes
from smalti.recipes.schema import PartiRecipe as PartiRecipe
from smalti.recipes.schema import PartiScenesRecipe as PartiScenesRecipe
from smalti.recipes.schema import Recipe as Recipe
from smalti.recipes.schema import ScenesRecipe as ScenesRecipe
from smalti.recipes.schema import TextToImageRecipe as TextToImageRecipe
from smalti.recipes.schema import TextToImageStage as TextToImageStage
from smalti.recipes.schema import TokenizerRecipe as TokenizerRecipe
from smalti.recipes.schema import UpsamplerRecipe as UpsamplerRecipe
