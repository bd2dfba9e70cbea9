"""The demo's instruction data set: records, and the sentence that announces each.

Which sentence a record takes depends on its values, so that an adapter has rules to learn besides the words.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Draw = random.Random

TOWNS = "Ashford Barnet Carlow Dunmore Elgin Fairhaven Grantham Harwick Ipley Kendal Lanark Milton Norwood".split()
PEOPLE = "Ada Ben Clara David Emma Frank Grace Henry Ida Jonas Kate Leo Maria Nils Olga Paul Rosa Simon".split()
FAMILIES = "Adler Brook Carter Dahl Evans Fischer Grant Hill Irving Jones Keller Lopez Moore Novak Olsen".split()
BOOKS = (
    "The Long River|A Winter Garden|Seven Small Islands|The Glass Tower|Letters from Home|The Quiet Sea|"
    "A History of Bread|The Last Lighthouse|Maps and Stars|The Orchard Road"
).split("|")
FOODS = "flour|butter|sugar|two eggs|warm milk|honey|chopped nuts|cocoa|grated cheese|sliced apples".split("|")
VESSELS = "large bowl|small pan|deep dish|clean jar".split("|")
GOODS = "desk lamp|wool blanket|garden chair|tea pot|leather bag|wall clock|rain coat|book shelf".split("|")


def instruction_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct rows of `prompt` and `completion`, in a random order."""
    draw = random.Random(seed)
    tasks: list[Callable[[Draw], tuple[str, str]]] = [_train, _weather, _library, _recipe, _parcel]
    rows: dict[str, str] = {}
    while len(rows) < count:
        prompt, completion = draw.choice(tasks)(draw)
        rows.setdefault(prompt, completion)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def _train(draw: Draw) -> tuple[str, str]:
    start, end = draw.sample(TOWNS, 2)
    number, platform = draw.randint(10, 99), draw.randint(1, 12)
    hour, minute, late = draw.randint(5, 22), draw.choice(["00", "15", "30", "45"]), draw.choice([0, 0, 5, 10, 20])
    record = f"train={number}; from={start}; to={end}; at={hour}:{minute}; platform={platform}; late={late}"
    if late:
        answer = f"We are sorry: train {number} from {start} to {end}, due at {hour}:{minute}, is {late} minutes late."
    else:
        answer = f"Train {number} to {end} leaves {start} at {hour}:{minute} from platform {platform}. All aboard!"
    return f"Announce the train. {record}", answer


def _weather(draw: Draw) -> tuple[str, str]:
    town, degrees = draw.choice(TOWNS), draw.randint(-9, 34)
    wind, sky = draw.choice(["north", "south", "east", "west"]), draw.choice(["clear", "cloudy", "rainy", "misty"])
    feeling = "freezing" if degrees < 0 else "cool" if degrees < 15 else "mild" if degrees < 25 else "hot"
    advice = {
        "freezing": "Wear gloves.",
        "cool": "Take a jacket.",
        "mild": "Enjoy the day.",
        "hot": "Drink enough water.",
    }[feeling]
    record = f"town={town}; degrees={degrees}; wind={wind}; sky={sky}"
    return (
        f"Report the weather. {record}",
        f"It is a {feeling} and {sky} day in {town}: {degrees} degrees, with a wind from the {wind}. {advice}",
    )


def _library(draw: Draw) -> tuple[str, str]:
    reader, book = f"{draw.choice(PEOPLE)} {draw.choice(FAMILIES)}", draw.choice(BOOKS)
    day, month, weeks = (
        draw.randint(1, 28),
        draw.choice(["March", "June", "August", "November"]),
        draw.choice([0, 1, 3]),
    )
    record = f"reader={reader}; book={book}; due={day} {month}; weeks={weeks}"
    if weeks:
        answer = f"Dear {reader}, your book {book} was due on {day} {month}. The fee is {weeks * 2} coins so far."
    else:
        answer = f"Dear {reader}, please bring {book} back to the library by {day} {month}. Thank you for reading."
    return f"Remind the reader. {record}", answer


def _recipe(draw: Draw) -> tuple[str, str]:
    first, second = draw.sample(FOODS, 2)
    vessel, minutes, heat = draw.choice(VESSELS), draw.choice([2, 5, 10, 25, 40]), draw.choice(["none", "low", "high"])
    record = f"first={first}; second={second}; vessel={vessel}; minutes={minutes}; heat={heat}"
    if heat == "none":
        answer = f"Stir {first} and {second} together in a {vessel}, then let it rest for {minutes} minutes."
    else:
        answer = (
            f"Put {first} into a {vessel}, add {second}, and cook everything over {heat} heat for {minutes} minutes."
        )
    return f"Write the recipe step. {record}", answer


def _parcel(draw: Draw) -> tuple[str, str]:
    person, item, town = draw.choice(PEOPLE), draw.choice(GOODS), draw.choice(TOWNS)
    code, days = f"{draw.choice('ABCDEFG')}{draw.randint(100, 999)}", draw.choice([0, 1, 2, 4])
    record = f"customer={person}; item={item}; town={town}; code={code}; days={days}"
    when = {0: "today", 1: "tomorrow"}.get(days, f"in {days} days")
    return (
        f"Tell the customer. {record}",
        f"Hello {person}! Your {item} is on its way to {town} and arrives {when}. The parcel number is {code}.",
    )
