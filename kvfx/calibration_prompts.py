"""Texts that ship with kvfx and with Python, for a calibration that needs no data of the user.

Evaluation reads Python's manual and the docstrings of other modules (`kvfx.testing.text`): nothing
of that is in here.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache

# modules of the standard library: docstrings that are prose or examples, and source code
DOCUMENTED = (
    "socketserver",
    "wave",
    "csv",
    "http.cookies",
    "json",
    "cmd",
    "urllib.request",
    "unittest",
)
SOURCES = ("heapq", "textwrap", "calendar", "shlex")

STORY = """\
The lighthouse at Varn Point had been dark for eleven winters when Ilse Moran came to mend it. \
She arrived on the mail boat with two trunks, a box of lenses packed in straw, and a letter from \
the harbour office that nobody on the island had asked for. The postmaster read the letter \
twice, once for its meaning and once for its spelling, and then pointed up the hill without a \
word.

The door was swollen shut. It took her and the postmaster's son, a boy called Peder, most of an \
hour to open it. Inside, the stairs were sound but the lamp room had become a home for gulls. \
They swept out feathers, eggshells and a single child's shoe, which Peder recognised and put \
into his pocket. "My sister's," he said. "She threw it at a bird." Ilse asked whether she had \
hit it. "No," said Peder. "That is why the bird kept it."

On the third day the wind turned. Ilse was counting the teeth of the great brass wheel that \
turned the lens, chalking a number on every tenth one, when she heard the bell of a ship that \
should not have been so close. She had no oil yet, and no wick. She had the box of lenses, a \
clear evening sun low over the water, and a boy who could run. "Take the long mirror from the \
hall of the inn," she told him. "Do not ask. Bring it up the stairs with the glass towards your \
chest." He was back before she had finished turning the wheel by hand to face the west.

The sun went into the mirror, and from the mirror into the lens, and out over the reef came a \
blade of light so narrow that it looked solid. The bell stopped. Slowly, as if it had all the \
time in the world, the ship swung away from the rocks. Nobody on board ever learned who had \
warned them. The innkeeper charged Ilse for the mirror, which had cracked on the stairs, and the \
harbour office, after an exchange of nine letters, charged it back to the innkeeper. Peder \
returned the shoe to his sister. The gulls, it must be said, never came back to the lamp room, \
though every spring one of them sat on the railing outside and looked in for a while, as one \
looks into a house where one used to live."""

ESSAY = """\
Why does bread go stale? Most people answer that it dries out, and most people are wrong, or at \
least they are right about something else. A loaf that is sealed in a bag, so that it can lose \
no water at all, goes stale nearly as fast as one that is left on the counter. What changes is \
not how much water the loaf holds but where the water is.

Flour is mostly starch, and starch comes in granules: tight bundles of long sugar chains, packed \
so regularly that parts of them are crystals. When dough is baked, the granules swell with \
water, the crystals melt, and the chains drift apart into a soft gel. This is why a fresh crumb \
is springy. As the loaf cools, the chains begin to find each other again. They line up, form new \
crystals, and squeeze water out of the gel into the protein network around it. The crumb becomes \
firm, and the crust, which takes up some of the water, becomes leathery. Chemists call the \
process retrogradation.

Three facts follow that every baker knows from experience. First, the process is fastest just \
above freezing, so a refrigerator is the worst place for bread; in a freezer, where the water \
cannot move, it stops almost completely. Second, heat undoes it: the new crystals melt at about \
sixty degrees, and therefore toasting or warming a stale slice makes it soft again, at least \
until it cools. Third, anything that gets between the chains slows it down. Fat does, and sugar, \
and the gums that are formed in a long fermentation; that is why brioche and sourdough keep \
better than a plain white loaf.

The numbers are easy to remember. Suppose that the firmness of a loaf kept at twenty degrees \
doubles in two days. At four degrees it doubles in less than one day, whereas at minus eighteen \
it changes by only a few per cent in a month. If you bake on Saturday and will not finish the \
loaf by Monday, then slice it, freeze what is left, and toast the slices one at a time. Keep the \
crust dry and the crumb wrapped, and do not believe anyone who tells you that the refrigerator \
is always the safe choice. For milk it is. For bread it is the one shelf in the house where time \
runs faster."""

TALK = """\
User: I have four boxes: red, green, blue and white. The red box holds 12 screws, the green one \
twice as many, the blue one 7 fewer than the green one, and the white one is empty. How many \
screws are there in all?
Assistant: The green box holds 2 x 12 = 24 screws and the blue one 24 - 7 = 17. Together that \
makes 12 + 24 + 17 + 0 = 53 screws.
User: Now I move five screws from the blue box to the white one, and all screws of the red box \
to the green one. Which box holds the most?
Assistant: After both moves the red box is empty, the green one holds 24 + 12 = 36, the blue one \
17 - 5 = 12, and the white one 5. The green box holds the most, with 36 of the 53 screws.
User: Write the contents of the boxes as JSON, please, with the colours as keys.
Assistant: {"red": 0, "green": 36, "blue": 12, "white": 5}
User: Thanks. Something else: translate "The train leaves at half past six" into German and French.
Assistant: German: "Der Zug fährt um halb sieben ab." French: "Le train part à six heures et demie."
User: Why does the German sentence say seven and not six?
Assistant: In German, "halb sieben" means half of the seventh hour, that is, thirty minutes \
before seven. English counts from the hour that has passed ("half past six"), German towards the \
hour that is to come.
User: And how would a Dutch speaker say it?
Assistant: In the same way as a German one: "De trein vertrekt om half zeven." Danish and \
Swedish do it too, so "halv syv" and "halv sju" both mean 6:30.
User: My meeting in Copenhagen is at "halv tre" and my flight lands at 13:50. Do I get there in \
time if the ride takes 35 minutes?
Assistant: "Halv tre" is 14:30. If you land at 13:50 and left the plane at once, you would \
arrive at 14:25, five minutes early. Leaving the plane and finding a taxi usually takes longer \
than that, so I would tell your hosts that you may be late.
User: Please draft that message. Two sentences, friendly, no excuses.
Assistant: "I land at 13:50 and will come straight to you, but I may arrive a few minutes after \
half past two. Please start without me if you like, and I will join as soon as I am there.\""""

RECORDS = """\
# inventory of the seed bank, shelf 14
id,species,family,collected,grams,viability
1401,Papaver rhoeas,Papaveraceae,2011-07-19,12.5,0.91
1402,Centaurea cyanus,Asteraceae,2011-07-19,30.0,0.88
1403,Agrostemma githago,Caryophyllaceae,2012-08-02,44.1,0.79
1404,Consolida regalis,Ranunculaceae,2012-08-02,9.8,0.62
1405,Adonis aestivalis,Ranunculaceae,2013-07-28,21.7,0.35
1406,Legousia speculum-veneris,Campanulaceae,2013-07-30,3.2,0.84
1407,Scandix pecten-veneris,Apiaceae,2014-08-11,18.0,0.57

## Rules for lending
1. Every request names a species, a quantity in grams and a purpose.
2. Lots with a viability below 0.40 are not lent; they are grown first.
   - lot 1405 is waiting for a bed since 2019
   - lot 1407 is tested again every second spring
3. A borrower returns twice what was lent, or explains in writing why not.

[2021-03-02 08:14:55] INFO  door opened, badge 0317
[2021-03-02 08:15:09] INFO  temperature -18.2 C, humidity 14 %
[2021-03-02 08:21:40] WARN  shelf 14: lot 1404 weighs 9.1 g, expected 9.8 g
[2021-03-02 08:21:58] INFO  shelf 14: lot 1404 corrected by badge 0317, note "sample for test 88"
[2021-03-02 08:30:12] INFO  door closed
[2021-03-02 09:02:31] ERROR compressor 2 stopped, restart 1 of 3
[2021-03-02 09:02:44] INFO  compressor 2 running
[2021-03-02 11:47:03] INFO  temperature -18.0 C, humidity 14 %

| test | lot  | seeds | sprouted | share |
| ---- | ---- | ----- | -------- | ----- |
| 86   | 1401 | 100   | 91       | 0.91  |
| 87   | 1402 | 100   | 88       | 0.88  |
| 88   | 1404 | 50    | 31       | 0.62  |
| 89   | 1405 | 40    | 14       | 0.35  |

{"request": 552, "species": "Papaver rhoeas", "grams": 2.0, "purpose": "school garden", \
"granted": true, "returned": null}
{"request": 553, "species": "Adonis aestivalis", "grams": 5.0, "purpose": "restoration", \
"granted": false, "reason": "viability 0.35"}
{"request": 554, "species": "Centaurea cyanus", "grams": 10.0, "purpose": "field margin", \
"granted": true, "returned": 20.4}
"""


@cache
def texts() -> tuple[str, ...]:
    """What prompts are made of: a story, an essay, a conversation, records; then documentation and
    source code in turn.
    """
    docs = [inspect.getdoc(importlib.import_module(name)) or "" for name in DOCUMENTED]
    code = [inspect.getsource(importlib.import_module(name)) for name in SOURCES]
    half = len(docs) // 2
    mixed = [text for pair in zip(docs[:half], code, strict=True) for text in pair]
    return (STORY, ESSAY, TALK, RECORDS, *mixed, *docs[half:])


def default_prompts() -> tuple[str, ...]:
    """Eight prompts of different kinds. Each goes on with the texts behind it, so that all of them
    are long.
    """
    every = texts()
    return tuple("\n\n".join((*every[n:], *every[:n])) for n in range(8))
