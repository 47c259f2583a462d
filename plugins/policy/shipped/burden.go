package shipped

import (
	"slices"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

const (
	// recent checkpoints are those that the next one is expected to be like.
	recent = 8
	// assumedCost of a checkpoint, in seconds, where none was taken yet.
	assumedCost = 0.1
	// firstWrite is what a page costs the guest that it writes before it was copied, in
	// seconds, where no checkpoint's loss was measured: as the writer sees it, with
	// engine uffd (docs/benchmarks.md).
	firstWrite = 16e-6
)

// Lost is the guest's time that a checkpoint took away, in seconds, as policies reckon it:
// its pause and the work lost while it was written.
func Lost(c *policy.Checkpoint) float64 { return seconds(c.GetPauseNs()) + lostWriting(c) }

func lostWriting(c *policy.Checkpoint) float64 {
	if share := c.GetWorkLostShare(); share > 0 {
		return seconds(c.GetTotalNs()) * share
	}
	return firstWrite * float64(c.GetCapturedPages())
}

// cost is the guest's time that the last checkpoints took away. assumed where there was
// none.
func cost(s *policy.Signals) (secs float64, assumed bool) {
	list := succeeded(s, recent)
	if len(list) == 0 {
		return assumedCost, true
	}
	return max(median(list, Lost), 1e-4), false
}

// costModel is what the next checkpoint is expected to cost. What it costs beyond its
// pause follows what the guest writes while it is taken: that is known from the signals,
// so that a checkpoint is cheap as soon as the guest is quiet, whatever those before it
// cost. The price of a page is what the last ones lost, over what they had to save.
func costModel(s *policy.Signals, mtbf, weight float64) formula.Cost {
	list := succeeded(s, recent)
	took, _ := duration(s)
	model := formula.Cost{Fixed: assumedCost, PerPage: firstWrite, FailureRate: 1 / mtbf, Weight: weight, Commit: took}
	var saved, writing float64
	for _, c := range list {
		saved += float64(c.GetCapturedPages())
		writing += lostWriting(c)
	}
	if n := len(list); n > 0 {
		model.Fixed = max(median(list, func(c *policy.Checkpoint) float64 { return seconds(c.GetPauseNs()) }), 1e-4)
		switch {
		case saved > 0:
			model.PerPage = writing / saved
		case writing > 0 || slices.Contains([]string{"stop", "buffer"}, list[n-1].GetMode()):
			model.Fixed += writing / float64(n) // it does not follow the pages
			model.PerPage = 0
		}
	}
	if g := curve(s); g.Pages > 0 {
		scan := scanShare(list)
		model.Pages = func(t float64) float64 { return g.Met(scan * model.Commit(t)) }
	} else if saved > 0 {
		// Nothing is known of what is written now: as much as was.
		usual := median(list, func(c *policy.Checkpoint) float64 { return float64(c.GetCapturedPages()) })
		model.Pages = func(float64) float64 { return usual }
	}
	return model
}

// scanShare is the share of a checkpoint's duration in which it passes over memory; 1 where
// that is not known. The rest is its preparation, and what the store does at the end: pages
// are not saved from being written then.
func scanShare(list []*policy.Checkpoint) float64 {
	share := median(list, func(c *policy.Checkpoint) float64 {
		if c.GetScanNs() <= 0 || c.GetTotalNs() <= 0 {
			return 1
		}
		return min(float64(c.GetScanNs())/float64(c.GetTotalNs()), 1)
	})
	if share <= 0 {
		return 1
	}
	return share
}
