# ruff: noqa: E501
"""The facts and words that the starter's corpus is made of. Written for this project; data only.

`corpus` turns them into documents. Kept small on purpose: a model of a few million parameters can hold all of it.
"""

from __future__ import annotations

NAMES = (
    "Anna Ben Clara Daniel Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor "
    "Wendy Max Lily Tom Nora Oscar Ruth Peter Sophie Hugo Alice Omar Leila Yusuf Mei Kenji Priya Arjun Zoe Ivan"
).split()

COLOURS = "red blue green yellow black white brown pink purple orange grey golden silver".split()

ADJECTIVES = (
    "big small old new happy sad quiet loud soft warm cold clean bright dark kind brave clever funny gentle "
    "hungry sleepy little heavy light strong shiny round empty busy strange"
).split()

THINGS = (
    "ball book cup hat lamp box bag boat car bike kite drum key coin clock chair table pencil letter "
    "blanket basket bottle ring shoe coat spoon plate map stone flower apple candle mirror ladder "
    "camera radio kettle phone window bell"
).split()

PLACES = (
    "the park|the garden|the forest|the beach|the market|the school|the library|the kitchen|the farm|the river|"
    "the lake|the village|the city|the station|the harbour|the hill|the bridge|the museum|the bakery|the old house"
).split("|")

TIMES = (
    "One morning|One day|One evening|Last summer|In the winter|After school|On Monday|On Sunday|Long ago|At night|"
    "On a rainy day|On a sunny day|Early in the morning|Before dinner"
).split("|")

# animal: sound, home, food, young, number of legs
ANIMALS = {
    "dog": ("woof", "in a house", "meat", "puppy", "four"),
    "cat": ("meow", "in a house", "fish", "kitten", "four"),
    "cow": ("moo", "on a farm", "grass", "calf", "four"),
    "sheep": ("baa", "on a farm", "grass", "lamb", "four"),
    "duck": ("quack", "near a pond", "seeds", "duckling", "two"),
    "horse": ("neigh", "in a stable", "hay", "foal", "four"),
    "pig": ("oink", "on a farm", "corn", "piglet", "four"),
    "hen": ("cluck", "in a coop", "grain", "chick", "two"),
    "lion": ("roar", "on the plains", "meat", "cub", "four"),
    "frog": ("croak", "near a pond", "flies", "tadpole", "four"),
    "owl": ("hoot", "in the forest", "mice", "owlet", "two"),
    "bee": ("buzz", "in a hive", "nectar", "larva", "six"),
    "bear": ("growl", "in the forest", "berries", "cub", "four"),
    "mouse": ("squeak", "in a hole", "cheese", "pup", "four"),
    "goat": ("bleat", "in the hills", "leaves", "kid", "four"),
    "wolf": ("howl", "in the forest", "meat", "pup", "four"),
    "penguin": ("honk", "on the ice", "fish", "chick", "two"),
    "rabbit": ("squeak", "in a burrow", "carrots", "bunny", "four"),
}

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Kenya": "Nairobi",
    "Sweden": "Stockholm", "Norway": "Oslo", "Portugal": "Lisbon", "Austria": "Vienna", "Ireland": "Dublin",
    "Peru": "Lima", "Cuba": "Havana", "Canada": "Ottawa", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Turkey": "Ankara", "India": "New Delhi", "Hungary": "Budapest", "Ghana": "Accra",
}  # fmt: skip

OPPOSITES = {
    "big": "small", "hot": "cold", "up": "down", "day": "night", "happy": "sad", "fast": "slow", "old": "young",
    "open": "closed", "light": "dark", "full": "empty", "hard": "soft", "high": "low", "early": "late", "near": "far",
    "wet": "dry", "rich": "poor", "strong": "weak", "left": "right", "in": "out", "good": "bad", "loud": "quiet",
    "clean": "dirty", "first": "last", "long": "short", "black": "white", "yes": "no", "thick": "thin", "new": "old",
}  # fmt: skip

COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red", "coal": "black",
    "a carrot": "orange", "a tomato": "red", "the sun": "yellow", "milk": "white", "chocolate": "brown",
    "a leaf": "green", "an elephant": "grey", "a flamingo": "pink", "a plum": "purple", "the sea": "blue",
    "a lemon": "yellow", "a strawberry": "red", "the night": "black", "a frog": "green",
}  # fmt: skip

PURPOSES = {
    "a knife": "cut things", "a pen": "write", "a bed": "sleep", "a cup": "drink", "a key": "open doors",
    "an oven": "bake bread", "a broom": "sweep the floor", "a boat": "sail on the water", "a clock": "tell the time",
    "a lamp": "make light", "a kettle": "boil water", "an umbrella": "stay dry in the rain", "a book": "read stories",
    "a spoon": "eat soup", "a hammer": "drive nails", "a phone": "talk to people far away", "a bike": "ride to school",
    "soap": "wash your hands", "a map": "find the way", "a coat": "keep warm", "a camera": "take pictures",
    "a ladder": "climb up high", "a needle": "sew clothes", "a radio": "listen to music",
}  # fmt: skip

JOBS = {
    "a baker": "bakes bread", "a doctor": "helps sick people", "a teacher": "teaches children",
    "a farmer": "grows food", "a pilot": "flies planes", "a sailor": "sails ships", "a painter": "paints pictures",
    "a cook": "makes meals", "a postman": "brings letters", "a gardener": "looks after plants",
    "a writer": "writes books", "a builder": "builds houses", "a tailor": "sews clothes",
    "a singer": "sings songs", "a driver": "drives cars", "a librarian": "looks after books",
}  # fmt: skip

GENERAL_FACTS = (
    (("How many days are in a week?", "How many days does a week have?"), "There are seven days in a week."),
    (("How many months are in a year?", "How many months does a year have?"), "There are twelve months in a year."),
    (("How many hours are in a day?", "How many hours does a day have?"), "There are twenty-four hours in a day."),
    (("What comes after Monday?", "Which day follows Monday?"), "Tuesday comes after Monday."),
    (("What comes after Friday?", "Which day follows Friday?"), "Saturday comes after Friday."),
    (("What is water?", "Tell me about water."), "Water is a clear liquid that we drink."),
    (("What is ice?", "Tell me about ice."), "Ice is frozen water."),
    (("What is the moon?", "Tell me about the moon."), "The moon is a ball of rock that circles the earth."),
    (("What is the sun?", "Tell me about the sun."), "The sun is a star that gives us light and warmth."),
    (("What is rain?", "Where does rain come from?"), "Rain is water that falls from clouds."),
    (("What is a tree?", "Tell me about trees."), "A tree is a tall plant with a trunk, branches and leaves."),
    (("What is bread made of?", "How is bread made?"), "Bread is made of flour, water, salt and yeast."),
    (("What season is hot?", "Which season is the warmest?"), "Summer is the warmest season."),
    (("What season is cold?", "Which season is the coldest?"), "Winter is the coldest season."),
    (("Which animal is the largest?", "What is the largest animal?"), "The blue whale is the largest animal."),
    (("What do plants need?", "What helps plants grow?"), "Plants need water, light and air."),
    (("Why do we sleep?", "Why is sleep good?"), "We sleep because our bodies need rest."),
    (("What is a friend?", "What makes a good friend?"), "A friend is someone who is kind and helps you."),
    (("What is music?", "Tell me about music."), "Music is sound that people make and enjoy."),
    (("What is a computer?", "Tell me about computers."), "A computer is a machine that follows instructions."),
)

SMALL_TALK = (
    (("Hello", "Hi", "Hello there", "Hey", "Good morning", "Good evening", "Hi there"),
     ("Hello! How can I help you?", "Hello! It is nice to hear from you.")),
    (("How are you?", "How are you today?", "How do you feel?", "Are you well?", "How is it going?"),
     ("I am fine, thank you. How are you?", "I am doing well. Thank you for asking.")),
    (("What is your name?", "Who are you?", "What are you called?", "Tell me your name.", "Do you have a name?"),
     ("I am a small language model. You can call me Starter.",)),
    (("What can you do?", "How can you help me?", "What are you good at?", "What do you know?"),
     ("I can talk about simple things, tell short stories and answer easy questions.",)),
    (("Thank you", "Thanks", "Thank you very much", "Thanks a lot", "That was helpful"),
     ("You are welcome!", "You are welcome. I am happy to help.")),
    (("Goodbye", "Bye", "See you later", "Good night", "I have to go now"),
     ("Goodbye! Have a nice day.", "Goodbye! Come back soon.")),
    (("I am sad", "I feel sad today", "I had a bad day", "I am not happy"),
     ("I am sorry to hear that. Do you want to talk about it?",)),
    (("I am happy", "I feel great today", "I had a good day", "Today was wonderful"),
     ("That is good to hear! What made you happy?",)),
    (("I am hungry", "I want to eat something", "What should I eat?"),
     ("You could eat some bread with cheese, or an apple.",)),
    (("I am tired", "I am so sleepy", "I need some rest"), ("Then you should rest. A short sleep can help.",)),
    (("I am bored", "What should I do today?", "I have nothing to do"),
     ("You could read a book, go for a walk or call a friend.",)),
    (("Tell me a joke", "Make me laugh", "Do you know a joke?"),
     ("Why did the clock go to school? It wanted to learn to tell the time!",
      "What does a cloud wear under its coat? Thunderwear!")),
    (("Do you like music?", "What music do you like?"), ("I cannot hear music, but I like to talk about it.",)),
    (("Are you a person?", "Are you human?", "Are you a robot?", "Are you real?"),
     ("No, I am a small computer program that learned from text.",)),
    (("How old are you?", "When were you born?", "What is your age?"), ("I am very new. I was made just now.",)),
    (("Where do you live?", "Where are you from?", "Where are you?"), ("I live in a computer.",)),
    (("What is the weather like?", "Will it rain today?", "Is it sunny?"),
     ("I cannot see the weather. You could look out of the window.",)),
    (("Can you help me?", "I need help", "Please help me"), ("Of course. What do you need?",)),
    (("I love you", "You are nice", "I like you"), ("Thank you! That is very kind.",)),
    (("I do not understand", "What do you mean?", "That makes no sense"),
     ("I am sorry. Let me try to say it in a simpler way.",)),
)  # fmt: skip

# What notes about an invented product can say: statement, answer, ways to ask, how to make a value.
# {p} is the product, {v} the value. They teach that many wordings mean one question.
ATTRIBUTES: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "price": ("The {p} costs {v}.", "The {p} costs {v}.", (
        "How much does the {p} cost?", "What is the price of the {p}?", "What do I pay for the {p}?",
        "How expensive is the {p}?", "Can you tell me the price of the {p}?", "How much money is the {p}?"), "money"),
    "colour": ("The {p} is {v}.", "The {p} is {v}.", (
        "What colour is the {p}?", "Which colour does the {p} have?", "What is the colour of the {p}?",
        "Tell me the colour of the {p}."), "colour"),
    "warranty": ("The warranty lasts {v}.", "The warranty lasts {v}.", (
        "How long is the warranty?", "Is there a warranty?", "What warranty do I get?", "Does it come with a guarantee?",
        "How many years of warranty are there?", "For how long is the {p} covered?"), "years"),
    "returns": ("You can send it back within {v}.", "You can send it back within {v}.", (
        "Can I return the {p}?", "How do I send it back?", "I want to return the {p}.", "What is the return policy?",
        "I do not like it. Can I give it back?", "How long do I have to return it?"), "days"),
    "delivery": ("Delivery takes {v}.", "Delivery takes {v}.", (
        "How long does delivery take?", "When will my {p} arrive?", "How fast do you ship?", "When do I get my order?",
        "How long is the shipping time?", "How many days until the {p} arrives?"), "days"),
    "maker": ("{v} invented the {p}.", "{v} invented the {p}.", (
        "Who invented the {p}?", "Who made the {p}?", "Who is the inventor of the {p}?", "Whose idea was the {p}?",
        "Who came up with the {p}?"), "name"),
    "city": ("The {p} is made in {v}.", "The {p} is made in {v}.", (
        "Where is the {p} made?", "In which city is the {p} built?", "Where does the {p} come from?",
        "Where do you make the {p}?", "Where is the factory?"), "city"),
    "weight": ("The {p} weighs {v}.", "The {p} weighs {v}.", (
        "How heavy is the {p}?", "What does the {p} weigh?", "What is the weight of the {p}?",
        "How much does the {p} weigh?", "Is the {p} heavy?"), "weight"),
    "power": ("The battery lasts {v}.", "The battery lasts {v}.", (
        "How long does the battery last?", "What is the battery life?", "How often must I charge the {p}?",
        "How long does the {p} run on one charge?", "How good is the battery?"), "hours"),
    "clean": ("Clean the {p} with {v}.", "Clean the {p} with {v}.", (
        "How do I clean the {p}?", "What is the best way to wash the {p}?", "My {p} is dirty. What should I do?",
        "How should I care for the {p}?", "Can I wash the {p}?"), "cleaner"),
    "reset": ("To reset the {p}, press the {v} button.", "To reset the {p}, press the {v} button.", (
        "How do I reset the {p}?", "My {p} does not work. What now?", "The {p} is broken. How can I restart it?",
        "How can I start the {p} again?", "The {p} stopped working."), "colour"),
    "open": ("The shop opens at {v}.", "The shop opens at {v}.", (
        "When does the shop open?", "What are your opening hours?", "At what time do you open?",
        "When can I visit the shop?", "Are you open in the morning?"), "clock"),
    "contact": ("You can call us on {v}.", "You can call us on {v}.", (
        "How can I reach you?", "What is your phone number?", "How do I contact support?", "Who can I call for help?",
        "I want to talk to someone."), "phone"),
}  # fmt: skip

CLEANERS = "warm water|a soft cloth|a dry brush|a little soap|salt and water|lemon juice".split("|")
SYLLABLES = "ba be bo bri ca cor da den do el fa fin gla go ha jo ka ki lo lu ma mi mor na ni nor o pa pe po ra ri ro sa se sol ta ti to tri u va ve vi wen xa ya za zi zu".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
