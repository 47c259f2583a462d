package formula

import "math"

// Young is the interval of J. W. Young, "A first order approximation to the optimum
// checkpoint interval", CACM 17(9), 1974: sqrt(2 cost mtbf). cost is the work a
// checkpoint takes away, mtbf the mean time between failures, both in seconds.
func Young(cost, mtbf float64) float64 { return math.Sqrt(2 * max(cost, 0) * max(mtbf, 0)) }

// Daly is the interval of J. T. Daly, "A higher order estimate of the optimum
// checkpoint interval for restart dumps", FGCS 22(3), 2006. In seconds; mtbf where a
// checkpoint costs twice that or more.
func Daly(cost, mtbf float64) float64 {
	cost, mtbf = max(cost, 0), max(mtbf, 0)
	if cost >= 2*mtbf {
		return mtbf
	}
	x := cost / (2 * mtbf)
	return math.Sqrt(2*cost*mtbf)*(1+math.Sqrt(x)/3+x/9) - cost
}

// Curve is the dirty-rate curve G(T) = Pages (1 - exp(-T / Tau)): how many distinct
// pages are written within T seconds.
type Curve struct {
	Pages float64 // what is written again and again, at most
	Tau   float64 // seconds
}

// Dirty is G(seconds).
func (c Curve) Dirty(seconds float64) float64 {
	if c.Pages <= 0 || seconds <= 0 {
		return 0
	}
	if c.Tau <= 0 {
		return c.Pages
	}
	return c.Pages * -math.Expm1(-seconds/c.Tau)
}

// Met is how many pages a checkpoint that is written for so many seconds has to save
// because the guest writes them first: of a scan that passes over memory once, at an even
// pace, the mean of G over its duration.
func (c Curve) Met(seconds float64) float64 {
	if c.Pages <= 0 || seconds <= 0 {
		return 0
	}
	x := seconds / c.Tau
	switch {
	case c.Tau <= 0 || math.IsInf(x, 1):
		return c.Pages
	case x < 1e-3: // the difference below would be lost in rounding
		return c.Pages * (x/2 - x*x/6)
	}
	return c.Pages * (1 + math.Expm1(-x)/x)
}

// Until is the time in which so many distinct pages are written; +Inf if never.
func (c Curve) Until(pages float64) float64 {
	switch {
	case pages <= 0:
		return 0
	case pages >= c.Pages:
		return math.Inf(1)
	}
	return max(c.Tau, 0) * -math.Log1p(-pages/c.Pages)
}

// KeepsUp is the least interval T at which checkpoints take no more than a share of the
// time, took(T) <= share T: each is stored before the next. took grows with T, ever more
// slowly, and has a limit. 0 if any interval does, +Inf without a share.
func KeepsUp(took func(T float64) float64, share float64) float64 {
	most := took(math.Inf(1))
	if most <= 0 {
		return 0
	}
	if share <= 0 {
		return math.Inf(1)
	}
	low, high := 0.0, most/share // took(T) <= share high for every T
	for range 64 {
		if mid := (low + high) / 2; took(mid) > share*mid {
			low = mid
		} else {
			high = mid
		}
	}
	return high
}

// OverheadCap is the next interval of a controller that keeps the share of time a
// guest is paused at target: it grows with the share seen, by a factor of 2 at most.
func OverheadCap(interval, share, target float64) float64 {
	if target <= 0 || interval <= 0 {
		return interval
	}
	return interval * min(max(share/target, 0.5), 2)
}

// Cost is what checkpoints every T seconds of a guest that runs on meanwhile cost per
// second, in seconds of its work: Lost(T) / T + FailureRate Weight (T/2 + Commit(T)), with
// Lost(T) = Fixed + PerPage Pages(T).
type Cost struct {
	Fixed       float64                 // seconds a checkpoint takes away whatever is written
	PerPage     float64                 // seconds more per page that it has to save from being written
	Pages       func(T float64) float64 // how many those are; nil: none
	Commit      func(T float64) float64 // seconds from the instant until the checkpoint counts; nil: none
	FailureRate float64                 // per second
	Weight      float64                 // of a second lost to a failure against one lost to checkpoints
}

// Lost is what one checkpoint after an interval takes away.
func (c Cost) Lost(seconds float64) float64 {
	if c.Pages == nil {
		return c.Fixed
	}
	return c.Fixed + c.PerPage*c.Pages(seconds)
}

// At is the cost of an interval.
func (c Cost) At(seconds float64) float64 {
	commit := 0.0
	if c.Commit != nil {
		commit = c.Commit(seconds)
	}
	return c.Lost(seconds)/seconds + c.FailureRate*c.Weight*(seconds/2+commit)
}

// Within is the least interval, from one on, at which checkpoints take away no more than
// a share of the time.
func (c Cost) Within(share, from float64) float64 {
	if !(share > 0) {
		return from
	}
	for range 64 { // Lost grows more slowly than T, and has a limit
		floor := c.Lost(from) / share
		if !(floor > from*(1+1e-6)) {
			break
		}
		from = floor
	}
	return from
}

// Least is the interval between the bounds that costs least. The cost may have more
// than one valley: it is looked for on a grid of ratios first.
func (c Cost) Least(shortest, longest float64) float64 {
	if shortest <= 0 || longest <= shortest {
		return shortest
	}
	const steps = 256
	ratio := math.Pow(longest/shortest, 1.0/steps)
	best, at := c.At(shortest), shortest
	for i, t := 1, shortest; i <= steps; i++ {
		t *= ratio
		if cost := c.At(t); cost < best {
			best, at = cost, t
		}
	}
	low, high := max(shortest, at/ratio), min(longest, at*ratio)
	for range 48 {
		a, b := low+(high-low)*0.382, low+(high-low)*0.618
		if c.At(a) < c.At(b) {
			high = b
		} else {
			low = a
		}
	}
	return (low + high) / 2
}
