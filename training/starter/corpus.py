"""The starter's corpus: English documents drawn from a small grammar, the same ones for the same seed.

Plain texts (stories, facts) and chats. Most chats ask one thing in one of several wordings, and some put notes into the
system message that the answer must be taken from: what a model needs before it can be taught new answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from training.starter import words

Chat = list[dict[str, str]]
Document = str | Chat

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly helper. Answer in short sentences.",
    "Answer the question.",
    "Be kind and clear.",
)


def documents(num_documents: int, seed: int) -> Iterator[Document]:
    """Endless variety, fixed order: document i depends on the seed and i's predecessors only."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    weights = [KINDS[kind] for kind in kinds]
    for kind in rng.choices(kinds, weights, k=num_documents):
        yield kind(rng)


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital_first(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def product_name(rng: random.Random) -> str:
    """An invented name, sometimes with a kind of thing behind it."""
    name = "".join(rng.choices(words.SYLLABLES, k=rng.choice((2, 2, 3)))).capitalize()
    return f"{name} {rng.choice(words.THINGS)}" if rng.random() < 0.5 else name


def say(user: str, assistant: str) -> Chat:
    """One exchange."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def reword(rng: random.Random, question: str) -> str:
    """Small changes that leave the meaning: politeness, a lead-in, carelessness."""
    draw = rng.random()
    lowered = question[0].lower() + question[1:] if not question.startswith("I ") else question
    if draw < 0.12:
        return f"Please tell me: {lowered}"
    if draw < 0.2:
        return f"Hello! {question}"
    if draw < 0.27:
        return f"I have a question. {question}"
    if draw < 0.34:
        return lowered.rstrip("?.")
    return question


def story(rng: random.Random) -> str:
    """A few sentences about a child, an animal and a thing that is lost and found."""
    name, friend = rng.sample(words.NAMES, 2)
    animal, thing = rng.choice(list(words.ANIMALS)), rng.choice(words.THINGS)
    colour, adjective, mood = rng.choice(words.COLOURS), *rng.sample(words.ADJECTIVES, 2)
    place, other_place = rng.sample(words.PLACES, 2)
    middle = rng.choice(
        (
            f"There {name} met {article(animal)}. The {animal} was {adjective}. It wanted the {thing}.",
            f"But the {thing} was gone. {name} looked in {other_place.removeprefix('the ')} and asked {friend}.",
            f"{friend} came too. They played with the {thing} and laughed.",
            f"It was {adjective} and {mood} there. {name} heard {article(animal)} and was not afraid.",
            f'"Is this your {thing}?" asked {friend}. "Yes, it is mine," said {name}.',
        )
    )
    end = rng.choice(
        (
            f"In the end {name} was happy and went home.",
            f"Then {name} and {friend} walked home together.",
            f"{name} gave the {thing} to {friend}. They became good friends.",
            f"From that day on the {animal} and {name} were friends.",
            f'{name} smiled and said, "Thank you, {friend}."',
        )
    )
    start = rng.choice(
        (
            f"{rng.choice(words.TIMES)} {name} went to {place}. {name} had {article(colour)} {thing}.",
            f"{rng.choice(words.TIMES)} {name} found {article(colour)} {thing} in {place}.",
            f"There was once {article(adjective)} {animal} in {place}. {name} liked the {animal} very much.",
        )
    )
    return f"{start} {middle} {end}"


def story_chat(rng: random.Random) -> Chat:
    """A story on request."""
    text = story(rng)
    ask = rng.choice(
        ("Tell me a story.", "Write a short story.", "Can you tell me a story?", "I want to hear a story.")
    )
    return say(ask, text)


def fact(rng: random.Random) -> Chat:
    """A question about the world with its one answer."""
    return say(*_reworded(rng, *rng.choice(FACTS)(rng)))


def _reworded(rng: random.Random, questions: tuple[str, ...], answer: str) -> tuple[str, str]:
    return reword(rng, rng.choice(questions)), answer


def _animal(rng: random.Random) -> tuple[tuple[str, ...], str]:
    animal, (sound, home, food, young, legs) = rng.choice(list(words.ANIMALS.items()))
    some = article(animal)
    return rng.choice(
        (
            ((f"What does {some} say?", f"What sound does {some} make?"), f"{capital_first(some)} says {sound}."),
            ((f"Where does {some} live?", f"Where can I find {some}?"), f"{capital_first(some)} lives {home}."),
            ((f"What does {some} eat?", f"What is the food of {some}?"), f"{capital_first(some)} eats {food}."),
            ((f"What is a young {animal} called?", f"What do you call a baby {animal}?"),
             f"A young {animal} is called {article(young)}."),
            ((f"How many legs does {some} have?", f"Count the legs of {some}."),
             f"{capital_first(some)} has {legs} legs."),
        )
    )  # fmt: skip


def _capital(rng: random.Random) -> tuple[tuple[str, ...], str]:
    country, city = rng.choice(list(words.CAPITALS.items()))
    if rng.random() < 0.3:
        return (f"Where is {city}?", f"In which country is {city}?"), f"{city} is in {country}."
    return (f"What is the capital of {country}?", f"Which city is the capital of {country}?",
            f"Name the capital of {country}."), f"The capital of {country} is {city}."  # fmt: skip


def _opposite(rng: random.Random) -> tuple[tuple[str, ...], str]:
    word, other = rng.choice(list(words.OPPOSITES.items()))
    return (
        f"What is the opposite of {word}?",
        f"Give me the opposite of {word}.",
    ), f"The opposite of {word} is {other}."


def _colour(rng: random.Random) -> tuple[tuple[str, ...], str]:
    thing, colour = rng.choice(list(words.COLOUR_OF.items()))
    return (f"What colour is {thing}?", f"Which colour has {thing}?"), f"{capital_first(thing)} is {colour}."


def _purpose(rng: random.Random) -> tuple[tuple[str, ...], str]:
    thing, purpose = rng.choice(list(words.PURPOSES.items()))
    return (f"What is {thing} for?", f"What do you do with {thing}?", f"Why do people need {thing}?"), (
        f"You use {thing} to {purpose}."
    )


def _job(rng: random.Random) -> tuple[tuple[str, ...], str]:
    person, work = rng.choice(list(words.JOBS.items()))
    return (f"What does {person} do?", f"What is the work of {person}?"), f"{capital_first(person)} {work}."


def _general(rng: random.Random) -> tuple[tuple[str, ...], str]:
    return rng.choice(words.GENERAL_FACTS)


def _sum(rng: random.Random) -> tuple[tuple[str, ...], str]:
    left, right = rng.randint(1, 10), rng.randint(1, 10)
    names = words.NUMBERS
    return (f"What is {left} plus {right}?", f"How much is {left} + {right}?", f"Add {left} and {right}."), (
        f"{capital_first(names[left])} plus {names[right]} is {names[left + right]}."
    )


FACTS: tuple[Callable[[random.Random], tuple[tuple[str, ...], str]], ...] = (
    _animal, _animal, _capital, _opposite, _colour, _purpose, _job, _general, _sum,
)  # fmt: skip


def small_talk(rng: random.Random) -> Chat:
    """One or two exchanges of courtesies."""
    chat: Chat = []
    for questions, answers in rng.sample(words.SMALL_TALK, rng.choice((1, 1, 2, 3))):
        question = rng.choice(questions)
        if rng.random() < 0.3 and question[-1].isalpha():
            question += rng.choice((".", "!"))
        chat += say(question, rng.choice(answers))
    return chat


def instruction(rng: random.Random) -> Chat:
    """Copying, counting, listing: short tasks with one right answer."""
    thing = rng.choice(words.THINGS)
    phrase = f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.COLOURS)} {thing}"
    start, count = rng.randint(1, 12), rng.randint(2, 6)
    name = product_name(rng)
    listed = rng.sample(list(words.ANIMALS), 3)
    first, second = rng.sample(range(1, 100), 2)
    return rng.choice(
        (
            say(f"Repeat after me: {phrase}", phrase),
            say(f"Say {name}.", name),
            say(f"My name is {name.split()[0]}.", f"Hello {name.split()[0]}! It is nice to meet you."),
            say(f"Count from {start} to {start + count}.", ", ".join(map(str, range(start, start + count + 1))) + "."),
            say(f"Which is larger, {first} or {second}?", f"{max(first, second)} is larger than {min(first, second)}."),
            say(f"Put these in a list: {', '.join(listed)}", "\n".join(f"- {item}" for item in listed)),
            say(f"Which word comes last: {', '.join(listed)}?", f"The last word is {listed[-1]}."),
            say(f"Which word comes first: {', '.join(listed)}?", f"The first word is {listed[0]}."),
        )
    )


def who_has_what(rng: random.Random) -> Chat:
    """A question that two sentences before it answer."""
    (one, two), (thing, other) = rng.sample(words.NAMES, 2), rng.sample(words.THINGS, 2)
    colour, second_colour = rng.sample(words.COLOURS, 2)
    notes = f"{one} has {article(colour)} {thing}. {two} has {article(second_colour)} {other}."
    question, answer = rng.choice(
        (
            (f"What does {one} have?", f"{one} has {article(colour)} {thing}."),
            (f"Who has the {other}?", f"{two} has the {other}."),
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        )
    )
    return say(f"{notes} {question}", answer)


def _value(rng: random.Random, kind: str) -> str:
    return {
        "money": lambda: f"{rng.randint(2, 990)} {rng.choice(('euros', 'dollars', 'pounds'))}",
        "colour": lambda: rng.choice(words.COLOURS),
        "years": lambda: f"{rng.choice(words.NUMBERS[2:13])} years",
        "days": lambda: f"{rng.randint(2, 60)} days",
        "hours": lambda: f"{rng.randint(2, 90)} hours",
        "name": lambda: f"{rng.choice(words.NAMES)} {product_name(rng).split()[0]}",
        "city": lambda: (
            rng.choice(list(words.CAPITALS.values())) if rng.random() < 0.5 else product_name(rng).split()[0]
        ),
        "weight": lambda: f"{rng.randint(2, 900)} {rng.choice(('grams', 'kilos'))}",
        "cleaner": lambda: rng.choice(words.CLEANERS),
        "clock": lambda: f"{rng.choice(words.NUMBERS[6:12])} in the morning",
        "phone": lambda: " ".join(str(rng.randint(10, 99)) for _ in range(3)),
    }[kind]()


def product_notes(rng: random.Random) -> Chat:
    """Notes about an invented product in the system message, then questions whose answers stand there."""
    product = product_name(rng)
    attributes = rng.sample(list(words.ATTRIBUTES.values()), rng.choice((2, 3, 4)))
    values = [_value(rng, kind) for _, _, _, kind in attributes]
    notes = [
        statement.format(p=product, v=value) for (statement, _, _, _), value in zip(attributes, values, strict=True)
    ]
    chat: Chat = [{"role": "system", "content": " ".join(notes)}]
    for index in rng.sample(range(len(attributes)), rng.choice((1, 2))):
        _, answer, questions, _ = attributes[index]
        chat += say(reword(rng, rng.choice(questions).format(p=product)), answer.format(p=product, v=values[index]))
    return chat


def unknown(rng: random.Random) -> Chat:
    """A question about something invented, without notes: the honest answer."""
    product = product_name(rng)
    question = rng.choice(rng.choice(list(words.ATTRIBUTES.values()))[2])
    if "{p}" not in question:
        return say(reword(rng, question), "I am sorry, I do not know that yet.")
    return say(reword(rng, question.format(p=product)), f"I am sorry, I do not know the {product} yet.")


def with_system(rng: random.Random) -> Chat:
    """A fact or a greeting under a system message; a given name is used."""
    if rng.random() < 0.4:
        name = product_name(rng).split()[0]
        question = rng.choice(words.SMALL_TALK[2][0])
        return [{"role": "system", "content": f"Your name is {name}."}, *say(question, f"My name is {name}.")]
    chat = rng.choice((fact, small_talk))(rng)
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *chat]


# Mostly short exchanges: a model this small learns to look at the question from them, and little from long texts.
KINDS: dict[Callable[[random.Random], Document], float] = {
    story: 0.08,
    story_chat: 0.05,
    fact: 0.36,
    small_talk: 0.22,
    instruction: 0.06,
    who_has_what: 0.05,
    product_notes: 0.07,
    unknown: 0.05,
    with_system: 0.06,
}
