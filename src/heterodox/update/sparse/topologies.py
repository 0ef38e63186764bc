"""The topologies that a recipe can choose from."""

from heterodox.core.slot import Slot
from heterodox.update.sparse.magnitude import Magnitude
from heterodox.update.sparse.rigl import RigL
from heterodox.update.sparse.set import SET
from heterodox.update.sparse.sparsae import Sparsae
from heterodox.update.sparse.static import Static
from heterodox.update.sparse.topology import Topology

TOPOLOGIES = Slot("topology", Topology, (Static, Magnitude, SET, RigL, Sparsae))

TopologyConfig = TOPOLOGIES.section()
