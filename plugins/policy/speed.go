package policy

import (
	"slices"
	"time"
)

// speedOf is how many checkpoints the store's speed is the median of.
const speedOf = 8

// StoreSpeed is how many bytes of a checkpoint are stored per second, as the last ones
// of a history were: the least of what the scan, compression and the store can do. 0: not
// known.
func StoreSpeed(history []*Checkpoint) float64 {
	var speeds []float64
	for _, c := range slices.Backward(history) {
		if c.GetOk() && c.GetTotalNs() > 0 && len(speeds) < speedOf {
			speeds = append(speeds, float64(c.GetStoredBytes())/time.Duration(c.GetTotalNs()).Seconds())
		}
	}
	if len(speeds) == 0 {
		return 0
	}
	slices.Sort(speeds)
	return speeds[len(speeds)/2]
}
