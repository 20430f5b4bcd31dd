"""Scale moved between layers and features rotated: the same function in floats, easier to round."""

from mpq.equalize.awq import awq as awq
from mpq.equalize.cross_layer import equalize as equalize
from mpq.equalize.folds import Fold as Fold
from mpq.equalize.folds import find_folds as find_folds
from mpq.equalize.rotate import Rotated as Rotated
from mpq.equalize.rotate import rotate as rotate
from mpq.equalize.shifts import Shift as Shift
from mpq.equalize.shifts import find_shifts as find_shifts
