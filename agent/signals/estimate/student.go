package estimate

import "math"

// t95 is the two-sided 95 % quantile of Student's t distribution, by the
// expansion of Cornish and Fisher about the normal quantile, which is good to
// three digits from 3 degrees of freedom on.
func t95(df float64) float64 {
	if math.IsInf(df, 1) {
		return 1.959964
	}
	switch {
	case df < 1.5:
		return 12.706
	case df < 2.5:
		return 4.303
	}
	const z = 1.959964
	g1 := (z*z*z + z) / 4
	g2 := (5*math.Pow(z, 5) + 16*z*z*z + 3*z) / 96
	g3 := (3*math.Pow(z, 7) + 19*math.Pow(z, 5) + 17*z*z*z - 15*z) / 384
	return z + g1/df + g2/(df*df) + g3/(df*df*df)
}
