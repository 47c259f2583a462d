package shipped

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

const second = float64(time.Second)

// Backoff after failed checkpoints: the first retry comes soon, the sixth after five
// minutes, never later than the interval.
const (
	firstRetry = 10.0 // seconds
	lastRetry  = 320.0
)

func seconds(ns int64) float64 { return float64(ns) / second }

// span is a length of time for people.
func span(s float64) string {
	if math.IsNaN(s) || s > 1e9 {
		return "ever"
	}
	d := time.Duration(s * second)
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(10 * time.Microsecond).String()
}

// bounded keeps an interval (seconds) within what the host allows and the operator's
// longest. What cannot be computed from the signals is the longest.
func bounded(s *policy.Signals, interval, longest float64) float64 {
	if math.IsNaN(interval) {
		interval = longest
	}
	least := seconds(s.GetCapabilities().GetMinIntervalNs())
	return max(min(interval, longest), least)
}

// since is the instant the next interval counts from.
func since(s *policy.Signals) int64 {
	if at := s.GetLastSuccessNs(); at > 0 {
		return at
	}
	return 0 // never: due now
}

// failures counts the failed checkpoints since the last success, and says when the
// last of them was.
func failures(s *policy.Signals) (n int, last int64) {
	for _, c := range slices.Backward(s.GetHistory()) {
		if c.GetOk() {
			break
		}
		if n++; n == 1 {
			last = c.GetAtNs()
		}
	}
	return n, last
}

// due makes a decision of an interval in seconds.
func due(s *policy.Signals, interval float64, reason string) *policy.Decision {
	now, ivl := s.GetNowNs(), int64(math.Round(interval*second))
	at := since(s) + ivl
	if since(s) == 0 {
		at, reason = now, "the first checkpoint; then: "+reason
	}
	if n, last := failures(s); n > 0 {
		wait := min(firstRetry*math.Pow(2, float64(n-1)), lastRetry, max(interval, firstRetry))
		if retry := last + int64(wait*second); retry > at {
			at = retry
			reason = fmt.Sprintf("%d failed in a row, the next attempt %s after the last; %s", n, span(wait), reason)
		}
	}
	var d *policy.Decision
	if at <= now {
		d = policy.Now(reason)
		d.IntervalNs = ivl
	} else {
		d = policy.At(at, ivl, reason)
	}
	return d
}

// Curve is the dirty-rate curve that signals tell of.
func Curve(s *policy.Signals) formula.Curve { return curve(s) }

// curve is the dirty-rate curve. Without a fitted one it is the rate, without a
// rate nothing is known to be written.
func curve(s *policy.Signals) formula.Curve {
	m := s.GetMemory()
	if m.GetGPages() > 0 && !math.IsInf(m.GetGPages(), 1) && m.GetGTauNs() >= 0 {
		return formula.Curve{Pages: m.GetGPages(), Tau: m.GetGTauNs() / second}
	}
	rate := m.GetDirtyPagesPerSecond()
	if !(rate > 0) || math.IsInf(rate, 1) {
		return formula.Curve{}
	}
	pages := float64(max(m.GetWssBytes(), s.GetVm().GetUsedBytes())) / pageBytes
	if pages < rate {
		pages = max(rate, float64(s.GetVm().GetRamBytes())/pageBytes)
	}
	return formula.Curve{Pages: pages, Tau: pages / rate}
}

const pageBytes = 4096

// succeeded are the last checkpoints that were committed, newest last.
func succeeded(s *policy.Signals, n int) []*policy.Checkpoint {
	var ok []*policy.Checkpoint
	for _, c := range s.GetHistory() {
		if c.GetOk() {
			ok = append(ok, c)
		}
	}
	return ok[max(0, len(ok)-n):]
}

// median of a figure of the last checkpoints; 0 if there are none.
func median(list []*policy.Checkpoint, of func(*policy.Checkpoint) float64) float64 {
	if len(list) == 0 {
		return 0
	}
	v := make([]float64, len(list))
	for i, c := range list {
		v[i] = of(c)
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// cost is the guest's time that a checkpoint takes away, in seconds: its pause and
// the work lost while it is written. assumed where nothing was measured yet.
func cost(s *policy.Signals) (secs float64, assumed bool) {
	list := succeeded(s, 8)
	if len(list) == 0 {
		return 0.1, true
	}
	return max(median(list, func(c *policy.Checkpoint) float64 {
		return seconds(c.GetPauseNs()) + seconds(c.GetTotalNs())*c.GetWorkLostShare()
	}), 1e-4), false
}

// bytesPerPage is what a written page takes in the store.
func bytesPerPage(s *policy.Signals) float64 {
	m := s.GetMemory()
	ratio := m.GetCompressRatio()
	if ratio <= 0 || ratio > 1 {
		ratio = 1
	}
	return pageBytes * ratio * (1 - min(max(m.GetZeroShare()+m.GetFalseDirtyShare()+m.GetDuplicateShare(), 0), 0.99))
}
