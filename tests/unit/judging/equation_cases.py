"""Steps and what the equations rule must say of them, one a line (⏎ is a line break)."""

from __future__ import annotations

# Label 1
RIGHT = r"""
Each of the 6 crates weighs $24,\!000/6 = 4000$ grams.
Each weighs $24{,}000/6 = 4000$ grams.
Each weighs $24\,000/6 = 4000$ grams.
Each weighs $24\;000/6 = 4000$ grams.
Each weighs $24~000/6 = 4000$ grams.
Each weighs 24.000 / 6 = 4.000 grams.
$12{,}345{,}678 + 1 = 12{,}345{,}679$
$1{,}000 \cdot 5 = 5{,}000$
Note that $720 = 6 \cdot 5!$.
$6 \cdot 5! = 720$
$5! = 120$
$5!/3! = 20$
$120 = 5!$
$n! = 5 \cdot 4 \cdot 3 = 60$
$4 \cdot 3! + 1 = 25$
$8! / (5! \cdot 3!) = 56$
$(5-1)! = 24$
$3 \cdot (2+1)! = 18$
so $10 \cdot 9 = 10!/8!$
6 * 5! = 720 ways
3 * 60 = 180 = 3 hours
12/16 = 75 percent
That is 12/16 = 75 per cent.
That is 12/16 = 75 %.
That is 12/16 = .75 = 75%
50 * 20 percent = 10
50 * 20% = 10
4 * 5 = 20 : 1
Day 2: 5 * 3 = 15
The frame needs $2(12) - 4 = 20⏎+ 0 = 20$ inches.
10/3 = 3.33
10/3 = 3.3
10/3 = 3.333...
2/3 = .667
22/7 = 3.14
3 x 4 = 12
the value of $2x$. 5 - 3 = 2
2^3 = 8
2^3 + 1 = 9
2^{3} + 1 = 9
5 + 4 = 3^2
10^3 / 2 = 500
2(3) = 6
(2)(3) = 6
<<48/2=24>>24
48/2 = <<48/2=24>>24 clips
3.0 \times 10^5 / 3 = 10^5
3 x 10^5 = 300000
5 x 10^3 = 5000
1,000 - 1 = 999
x = 3 or 2 + 4 = 6
(98.6 - 32) * 5/9 = 37 degrees
5 - 3 = 2 \cdot 1
6 = 2 · 3
3/5 + 1/5 = 80 percent
0.5 + 0.25 = 75%
0.5 + 0.25 = 75 percent
2 + 2 = 4.00
The total is $4.20 + $9.45 + $1.35 = $<<4.20+9.45+1.35=14.999999999999998>>14.99.
The price was $0.5 - $0.4 = $<<0.5-0.4=0.09999999999999998>>0.1.
140/60 = 2.3333333333333335
The cost is $18\,000 / 9 = 2000$ dollars.
$1\,250\,000/2 = 625\,000$
So $100{,}000/4 = 25000$.
$2 \cdot 3! \cdot 2! = 24$
$7!/5! = 7 \cdot 6 = 42$
4! + 4! = 48 ways
The number is 3!*2 = 12.
$0! + 1 = 2$
9 * 8! = 9!
The answer is 6 * 20 = 5!
2 * 60 = 5!, as required
60 + 60 = 5!
There are 4 * 3 = 2 * 3! ways
3 * 12 = 36 inches = 3 feet
3 feet * 12 = 36 inches
1430 - 100 = 1330
3/4 = 75%
$3/4 = 75\%$
3/4 * 100 = 75%
0.2 * 50 = 10%
30 + 20 = 50%
30% + 20% = 0.5
200 * 1.1 = 220%
200 * 15% = 30
15% * 200 = 30
15 * 200 = 3000%
15*200/100 = 30
5/100 = 5 per cent
100 - 20 = 80%
100% - 20% = .8
20/80 = 25 percent increase
The odds are 3 + 2 = 5 : 1
3 x 4 = 4 x 3
1000 - 1/3 = 999.67
2/3 * 9.99 = 6.66
2.718 * 2 = 5.44
1/7 = 0.142857...
1/7 = 0.14
1/3 = 0.3 repeating
\det = 1 \cdot 4 - 2 \cdot 3 = -2
f(2) = 2 \cdot 2 + 1 = 5
T_4 = 4 + 3 = 7
|A \cup B| = 3 + 4 - 1 = 6
2^{10} = 1024
2^2 * 3 = 12
2^2 \cdot 3^2 = 36
36 = 2^2 \cdot 3^2
36 = 2 * 2 * 3^2
40 = 2^3 * 5
5 * 2^3 = 40
1.5 x 10^3 = 1500
$1.5 \times 10^{3} = 1500$
$6 \times 10^{4} / 2 = 30000$
5 million + 3 million = 8 million
5 + 3 = 8 < 9
7 > 3 + 3 = 6
We have 5 + 2 = 7 = 14/2
so 3 + 4 = 7 and 7 - 2 = 5 = 10/2
The score is 21-15 = 6 points
a 3-2 = 1 lead
Route 66 + 1 = 67
In 1990 + 10 = 2000
a 50-50 = 0 split
3/4 (8 + 4) = 9
3/4(8 + 4) = 9
1/2(6 + 4) = 5
– 5 + 3 = 8
-(3 - 5) = 2
y = 3(2) + 2 = 8
3 + 4 = 6 + 1
5 + 3 = 8! wow
once 5 + 2 = 7
{3, 4 + 1 = 5}
\frac{1}{2}(6 + 4) = 5
\frac{2}{3} \cdot \frac{9}{4} = \frac{3}{2}
\tfrac{1}{2} \cdot 6 = 3
5 + 3 < 9 = 3 * 3
2 < 5 = 3 + 2
5 + 3 =\frac{16}{2}
5 + 3 = \frac{16}{2}
5 + 3 = 2\cdot 4
5 + 3 = 2 \cdot 2^2
1/3 = 33.3%
1/8 = 12.5 percent
0.05 * 100 = 5%
100 / 20 = 500%
20 / 100 = 20 percent
30 mph * 2 = 60 miles
3 gallons * 4 = 12 quarts
3*10^-2 = 0.03
-2^2 = -4
-3^2 + 1 = -8
3x + 2 = 8, so 3x = 6
36 = 4 * (3)^2
4 + 2 = 2\sqrt{9}
\binom{5}{2} + 1 = 11
\pi * 4 = 12.57
3\sqrt{4} + 1 = 7
2^{1/2} * 2 = 2.83
16 \pi - 4 = 46.27
\frac{3 + 4}{7} = 1
5 + 3 = \sqrt{64}
"""

# Label 0: true slips
WRONG = r"""
18 + 38 = 57
So 18 + 38 = 57.
He has 18 + 38 = 57 apples.
Altogether, they have 18 + 38 = 57 apples.
The total is 18 + 38 = 57 dollars.
Jerry took 2*8 = 24 hours fixing the counter
She spent $18 + $38 = $57.
She spent $18 + $38 = $57 in total.
Therefore, $18 + 38 = 57$.
Thus $18 \cdot 3 = 55$.
\[18 + 38 = 57\]
\[ 18 + 38 = \boxed{57} \]
\(18 + 38 = 57\)
$$18 + 38 = 57$$
**Step 1:** 18 + 38 = 57
Step 1: 18 + 38 = 57
Step 2: She sold 18 + 38 = 57 clips.
1. 18 + 38 = 57
- 18 + 38 = 57
Total: 18 + 38 = 57
Total cost = 18 + 38 = 57
x = 18 + 38 = 57
x = 5 - 3 = 3
12 * 3 = 35
<<12*3=35>>35
12 * 3 = <<12*3=35>>35 apples
She paid 3 * $12 = $<<3*12=35>>35.
10/3 = 3.34
8/2 = 3
1,200 + 300 = 1,400
1{,}200 + 300 = 1{,}400
24 ÷ 6 = 4 and 4 × 2 = 9
3 + 4 = 7 + 2 = 9
2 + 3 = 5 * 2 = 10
5/0 = 3
2 + 3 * 4 = 20
2(3 + 4) = 15
(2 + 3) * 4 = 21
0.5 * 30 = 16
20% * 50 = 11
We get 18 + 38 = 57 and then 57 - 7 = 50
a total of 18 + 38 = 57 apples
for a total of 18 + 38 = 57
The sum of these is 18 + 38 = 57
Adding them up gives 18 + 38 = 57.
Adding 18 + 38 = 57.
She bought 5 x 6 = 31 eggs
5 x 6 = 31
$5 \times 6 = 31$
5 × 6 = 31
The area is 5 * 6 = 31 square feet
It is 14 + 17 = 32 years old.
The answer is 18 + 38 = 57.
which means 18 + 38 = 57 people came
because 18 + 38 = 57
There are 70 + 40 = 100 people
There were 60 - 12 = 58 left.
So 60 - 12 = 58 minutes remain.
7/2 = 3.6
12.50 - 12.25 = 0.35
$12.50 - $12.25 = $0.35
-5 + 3 = 2
2 - 5 = 3
He had 45 + 17 = 63 marbles left.
They sold 120 + 85 = 215 tickets.
Then he adds 45 + 17 = 63
The area of the square is $4 \cdot 4 = 15$.
The perimeter is 2(3 + 5) = 18 cm.
So the price is $40 * 0.9 = $38.
So $x = 5 + 7 = 13$.
First, 5 + 7 = 13. Then 13 * 2 = 26.
5 + 7 = 13⏎13 * 2 = 26
5 + 7 = 13, so she has 13.
5 + 7 = 13; 13 * 2 = 26
(a) The total is 5 + 7 = 13.
Step 3: 5 + 7 = 13
**Total:** 5 + 7 = 13
- Apples: 5 + 7 = 13
* 5 + 7 = 13
2. 5 + 7 = 13
• 5 + 7 = 13
Day 1: 5 + 7 = 13 miles
Therefore, the answer is $\boxed{5 + 7 = 13}$.
Therefore, she has 5 + 7 = \boxed{13} apples.
The cost is 5 * $7 = $36.
$5 \cdot 7 = 36$ apples
Thus, 144 / 12 = 13 eggs.
There are 365 - 100 = 255 days remaining.
In total there are 365 - 100 = 255 days.
She works 8 * 5 = 45 hours a week.
Multiplying 8 * 5 = 45.
Subtracting 65 - 10 = 45.
We have 3 \times 15 = 46.
3 × 15 = 46 students
So he walked 3*15=46 miles
1/2 + 1/3 = 2/5
$\frac{1}{2} + \frac{1}{3} = \frac{2}{5}$
The fraction is $\frac{1}{2} + \frac{1}{3} = \frac{2}{5}$.
0.1 + 0.2 = 0.4
1.5 * 4 = 7
9 - 12 = 3
(5 + 7) * 2 = 26
The average is (4 + 6) / 2 = 6.
$(4+6)/2 = 6$
\[ 5 \times 3 = 16 \]
So, we have: \[ 5 \times 3 = 16 \]
\[ 5 \times 3 + 2 = 18 \] apples.
\[ \text{Total} = 5 + 3 + 2 = 11 \]
\[ \text{Total cost} = 3 \times \$5 = \$16 \]
Total cost = 3 * $5 = $16
The total cost is $3 \times 5 = 16$ dollars.
Alice has 3 + 5 = 9 apples, and Bob has 2 + 2 = 4 apples.
1. Calculate the total: 3 + 5 = 9
2. **Cost of apples**: 3 * 5 = 16
- Cost of apples: 3 * 5 = 16 dollars
Next, we multiply 3 * 5 = 16.
Now add 3 + 5 = 9.
Since 3 + 5 = 9, we get 9.
After that she has 3 + 5 = 9 left.
So the number of eggs is 3 + 5 = 9.
Hence $3 + 5 = 9$ is the answer.
In the first week, she ran 3 + 5 = 9 miles.
Then, 100 - 37 = 73.
Finally, 100 - 37 = 73.
Bob pays 100 - 37 = $73.
Bob pays $100 - $37 = $73 more.
This is equal to 100 - 37 = 73.
This equals 100 - 37 = 73.
It costs 4 * 2.5 = 11 dollars.
The difference is 100 - 37 = 73
The product is 12 * 12 = 148
The sum is 12 + 12 = 25
The remaining amount is 50 - 12 = 42 dollars.
Tom's age is 12 + 7 = 20.
(3 + 5) = 9
3 + 5 = 9 (since there are more)
We know 3 + 5 = 9
"""
