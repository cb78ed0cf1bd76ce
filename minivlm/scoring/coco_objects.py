"""COCO's 80 categories and common words for them, for CHAIR. Our own, shorter list than the reference's.

Category names: cocodataset.org, instances_val2014.json. Words are singular; a name without further words stands alone.
"""

_WORDS = """
person: man woman boy girl kid child baby guy lady people rider player adult skier surfer snowboarder skateboarder
bicycle: bike
car: taxi cab van suv sedan minivan automobile jeep
motorcycle: motorbike scooter moped
airplane: plane jet aircraft airliner jetliner
bus: minibus
train: locomotive
truck: lorry pickup firetruck
boat: ship sailboat canoe kayak yacht ferry rowboat motorboat
traffic light: stoplight streetlight, street light, stop light, traffic signal
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: duck seagull gull pigeon parrot owl goose swan eagle
cat: kitten kitty
dog: puppy pup
horse: pony foal
sheep: lamb goat
cow: cattle bull calf ox
elephant:
bear: panda
zebra:
giraffe:
backpack: knapsack
umbrella: parasol
handbag: purse
tie: necktie
suitcase: luggage
frisbee:
skis: ski
snowboard:
sports ball: ball
kite:
baseball bat:
baseball glove:
skateboard:
surfboard:
tennis racket: racket racquet
bottle:
wine glass:
cup: mug
fork:
knife:
spoon:
bowl:
banana:
apple:
sandwich: burger hamburger
orange:
broccoli:
carrot:
hot dog: hotdog
pizza:
donut: doughnut
cake: cupcake
chair: stool
couch: sofa
potted plant: houseplant
bed:
dining table: table desk
toilet: urinal
tv: television monitor
laptop: computer notebook
mouse:
remote:
keyboard:
cell phone: phone cellphone smartphone telephone, mobile phone
microwave:
oven: stove
toaster:
sink:
refrigerator: fridge
book:
clock:
vase:
scissors:
teddy bear: teddy
hair drier: hairdryer, hair dryer
toothbrush:
"""


def _read() -> dict[str, str]:
    """Word or words -> category. Behind a comma stand words that are one name."""
    names: dict[str, str] = {}
    for line in _WORDS.strip().splitlines():
        name, _, rest = line.partition(":")
        single, *several = rest.split(",")
        names |= dict.fromkeys([name, *single.split(), *(words.strip() for words in several)], name)
    return names


NAME_OF = _read()
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "knives": "knife", "mice": "mouse", "geese": "goose",
    "oxen": "ox", "calves": "calf", "ladies": "lady", "babies": "baby", "puppies": "puppy", "ponies": "pony",
    "ferries": "ferry", "skis": "skis", "scissors": "scissors", "glasses": "glass",
}  # fmt: skip
"""Plurals that are more than an s or es."""
