"""Characters of Glyph-LVIS: the 1203 that it can show, as many as LVIS v1 has categories, and their names.

All are in the DejaVu fonts. The first 50 are chosen by hand: 16 families of look-alikes, then single characters that
fill up the 50. The others are chosen by their pictures, among letters, digits and symbols of all scripts that are
written from left to right: an inked box at most 3.5 times as long as wide, at most four parts, and, after scaling to
one box size, a difference of at least 20% of the ink from every class before it, in every face and for relative
rotations up to 24 degrees. So Latin A is a class, and Greek Alpha and Cyrillic A, which look the same, are none.
Characters that more faces can draw come first.
"""

import unicodedata

LOOK_ALIKES = (
    ("O", "0", "Q"),
    ("B", "8"),
    ("Σ", "∑"),
    ("S", "5", "$"),
    ("Z", "2"),
    ("G", "6", "C"),
    ("E", "F"),
    ("P", "R"),
    ("a", "α"),
    ("w", "ω"),
    ("9", "g", "q"),
    ("Y", "¥"),
    ("♠", "♣"),
    ("v", "ν"),
    ("M", "N"),
    ("β", "ß"),
)
_SINGLE = "AKT47&@#?ΩΨλ♥★"
_CHOSEN_BY_PICTURE = (
    "+13<=>Xdfhkmrt¢£¤ª¬±µÀÆÇÈÎÑÒ×ÚÝÞàæéĄĆćďĘęĝĩĲĴĶķĹĻľĿŀłńŅņŉŒŔŕŖŚśŞŢţŤůŲŴŹźƆƊƒƔƕƜƝƣƧƪƯƴƹƾǟǢ"
    "ǣǩǬǮȤȭȳȴȵȸȹȻȾȿɀɁɄɖɚɧɬɮɱɲɸɹɻʁʆʇʍʐʑʓʕʗʝʞʟʣʤʦʧʨʩʪʫʬʭʮΈΉΊΎΐΞΠάήίζώϗϞϠϡϻЃЉЊЋЌЖЙФЧЬЮлщѣґҗҘқңҤҲ"
    "ӁӃӋӟӬӴӶӸԴԵԶԸԹԻԿՀՁՆՊՎՐՖիխչջփևდპრტუფქჯჱჳჴჺᴖᴗᴞᴟᵻḅḈḉḜḝḟḣḬḸḾḿṔṜṝṟṩṫṼṾẈẊẓẙẬậừựỴἊἐἚἦἪἮἲἶἺἾὊὛὮᾀᾆ"
    "ᾊᾘᾚᾞᾠᾩᾪᾮῳῺ€₯₴₹№←→↓↖↗↘↙↚↛↜↝↟↢↣↧↨↮↯↰↱↲↳↵↶↷↸↹↺↻↾↿⇀⇃⇄⇅⇆⇍⇏⇑⇓⇖⇗⇙⇚⇛⇡⇤⇥⇦⇧⇨⇩⇫⇰⇱⇲⇶⇿∆∈∉∋∌∓∕∗√∛∝∞∟∠∬"
    "∭≈≠≤≥⊂⊃⊄⊅⊆⊇⊔⊕⊟⊠⊢⊣⊥⋄⌑⌘⌥⏏▓□▣▬▭▯▱▲△▷▻▼▽◀◁◅◊○◐◑◒◓◔◗◚◜◝◞◟◠◡◣◤◥◪◭◴◶◸◹◺◿☸☺☿♀♁♂♃♄♅♆♇♡♢♤♧♩♪♫♬♭♯⩪⩫"
    "⬖⬗⬘⬙ⱮℂℍℕℙℚℝℤⅈǄǅǆǇǊǱɂɆɏͲͷѤѪѬѰҦԒԔຂຈຊນຜຝສຫຯະຳႠႡႤႥႦႧႫႬႰႲႵႸႼႽႿჀჁჄჅᴒẚẨẾểỺỻ⁒₠₧₫₰₺℃℉℗℮Ⅎ⅄⅋∔∦≅≍≎≏≗"
    "≛≞≟≣≦≧≭≮≰≱≶≷≸≹≺≻≼≽≾≿⊁⊈⊉⊊⊋⊦⊧⊨⊩⊪⊫⊬⊭⊯⊲⊳⊸⋐⋑⋚⋛⋜⋝⋞⋟⋠⋡⋦⋧⋨⋩⌁⌃⌄⌅⌆⌌⌍⌏⌝⌦⌧⌫⏎⟰⟲⟳⟴⤆⤇⤊⧺⨌⨍⨎⬂⬎⬏⬐⬑ⴀⴂⴃⴄⴅⴆⴍⴎ"
    "ⴏⴐⴑⴓⴕⴚⴜⴝⴟⴡⴢⴣꙐꙖꙗꜢꜨꜴꜹꜺꜼꝆꞎꟻꟽꟿﬀﬃﬆ☁☂☆☇☈☉☊☋☍☏☑☒☖☗☙☛☜☝☞☟☠☡☢☤☥☦☧☨☩☪☫☬☭☽☾♈♉♊♋♌♍♎♏♐♑♒♓♔♕♖♗♘♙♛♝♞♱♲♽"
    "♾♿⚁⚆⚐⚑⚒⚓⚔⚕⚖⚗⚘⚙⚚⚛⚠⚡✁✃✄✆✈✉✌✍✎✏✐✑✒✓✔✗✙✞✟✠✡✦✧✬✭✮✰✲✳✵✾✿❅❆❚❝❞❡❢❦❧➛➟➢➣➤➩➪➫➬➭➮➯➱➳➴➵➶➻➼➽➾ℼℽℾ⅀ⅅⅆⅇⅉ"
    "𝔸𝔹𝔼𝔾𝕀𝕂𝕃𝕄𝕆𝕊𝕋𝕌𝕍𝕎𝕏𝕐𝕒𝕓𝕔𝕗𝕘𝕜𝕝𝕞𝕡𝕤𝕥𝕨𝕩𝕪𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡ϦϧѦѨѮѸѼҊҨҼҾӆӻӽӿԀԃԄԆԊԖԗԠຽເໂໃ໒໓໔໖໗໘ໜᐁᐂᐆᐋᐌᐏᐑᐒᐓᐔᐕᐘᐙᐚ"
    "ᐫᐮᐴᐷᐹᐻᐾᑁᑃᑄᑅᑇᑑᑗᑙᑚᑛᑜᑞᑠᑡᑢᑣᑤᑬᑰᑳᑴᑵᑶᑷᑸᑹᑺᑾᑿᒀᒁᒇᒉᒊᒍᒎᒏᒒᒓᒔᒕᒖᒗᒘᒙᒜᒝᒞᒩᒬᒮᒲᒵᒶᒹᓀᓃᓄᓅᓇᓈᓉᓊᓋᓍᓓᓔᓕᓗᓘᓚᓛᓜᓝᓞᓟᓠᓡᓢᓣᓤ"
    "ᓥᓦᓧᓨᓩᓭᓮᓯᓲᓳᓵᓶᓷᓸᓹᓺᓻᔂᔃᔄᔐᔑᔒᔓᔔᔕᔖᔗᔘᔙᔚᔛᔜᔝᔞᔟᔠᔡᔢᔣᔤᔦᔧᔨᔪᔫᔭᔮᔯᔰᔱᔲᔳᔴᔵᔶᔷᔸᔹᔺᔻᔼᕂᕅᕋᕌᕎᕏᕒᕔᕝᕢᕸᕾᕿᖀᖁᖂᖃᖄᖅᖋᖌᖍᖎᖏᖐᖑ"
    "ᖒᖓᖔᖖᖠᖢᖣᖤᖥᖩᙇᙯᙰᙱᙲᙳᙴᙵᙶ℄ℋℌℐℑℒℓ℔℘ℛℜ℞℣℥ℨℬℭℯℰℱℳℵℶℷℸℹ℻∖∡∯∰∱≪≫⊰⊱⊶⊹⊺⊻⊼⊾⊿⋀⋇⋈⋋⋌⋒⋓⋔⋘⋙⋪⋫⋬⋭⋲⋵⋶⋸⋺⋽⋿⌤⌬⎇⏨①"
    "③④⑦⑩⚞⚟⚢⚣⚤"
)
CHARACTERS = "".join("".join(family) for family in LOOK_ALIKES) + _SINGLE + _CHOSEN_BY_PICTURE


def families(classes: int, skipped: int = 0) -> list[str]:
    """`classes` characters after the first `skipped`, look-alikes together, others alone; some are cut short."""
    found: list[str] = []
    start = 0
    for family in [*("".join(family) for family in LOOK_ALIKES), *_SINGLE, *_CHOSEN_BY_PICTURE]:
        end = start + len(family)
        if kept := family[max(0, skipped - start) : max(0, skipped + classes - start)]:
            found.append(kept)
        start = end
    return found


def category_name(character: str) -> str:
    """LVIS-style name: `latin_capital_letter_o` for O."""
    return unicodedata.name(character).lower().replace(" ", "_")
