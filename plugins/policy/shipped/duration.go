package shipped

import (
	"slices"

	"github.com/ckagent/ckagent/plugins/policy"
)

// apart is how many times as much as another a checkpoint must have stored for the two to
// tell what storing takes; what those differ in that stored about the same is chance.
const apart = 4

// duration says how long a checkpoint that is taken after an interval takes; known: by those
// that were taken, or by the store's speed. Without either it is no time.
//
// One that stores only what was written since the one before still has its preparation, and
// as a rule a look at all memory, which take as long after any interval.
func duration(s *policy.Signals) (took func(interval float64) float64, known bool) {
	list := slices.DeleteFunc(succeeded(s, len(s.GetHistory())), func(c *policy.Checkpoint) bool { return c.GetTotalNs() <= 0 })
	g := curve(s)
	follows := s.GetCapabilities().GetIncremental() && g.Pages > 0
	if len(list) == 0 {
		speed := s.GetHost().GetStoreBytesPerSecond()
		if !(speed > 0) {
			return func(float64) float64 { return 0 }, false
		}
		if follows {
			return func(t float64) float64 { return g.Dirty(t) * bytesPerPage(s) / speed }, true
		}
		all := float64(s.GetVm().GetUsedBytes()) / speed
		return func(float64) float64 { return all }, true
	}
	if follows {
		if base, perByte, told := storing(list); told {
			return func(t float64) float64 { return base + perByte*g.Dirty(t)*bytesPerPage(s) }, true
		}
	}
	last := median(list[max(0, len(list)-recent):], taking)
	return func(float64) float64 { return last }, true
}

func taking(c *policy.Checkpoint) float64 { return seconds(c.GetTotalNs()) }

// storing is what checkpoints take whatever they store, and for each byte of it: the line
// that is nearest to what they took by the squares of its distances (Gauss). told: they are
// different enough to tell.
func storing(list []*policy.Checkpoint) (base, perByte float64, told bool) {
	n := float64(len(list))
	var bytes, time float64
	least, most := list[0].GetStoredBytes(), list[0].GetStoredBytes()
	for _, c := range list {
		bytes += float64(c.GetStoredBytes()) / n
		time += taking(c) / n
		least, most = min(least, c.GetStoredBytes()), max(most, c.GetStoredBytes())
	}
	if most/apart < max(least, 1) {
		return 0, 0, false
	}
	var square, cross float64
	for _, c := range list {
		off := float64(c.GetStoredBytes()) - bytes
		square += off * off
		cross += off * (taking(c) - time)
	}
	// Neither is less than nothing.
	perByte = min(max(cross/square, 0), time/bytes)
	return time - perByte*bytes, perByte, true
}
