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

// due makes a decision of an interval in seconds.
func due(s *policy.Signals, interval float64, reason string) *policy.Decision {
	now, ivl := s.GetNowNs(), int64(math.Round(interval*second))
	at := since(s) + ivl
	if since(s) == 0 {
		at, reason = now, "the first checkpoint; then: "+reason
	}
	if retry := policy.Retry(s, ivl); retry > at {
		n, last := policy.Failures(s)
		at = retry
		reason = fmt.Sprintf("%d failed in a row, the next attempt %s after the last; %s", n, span(seconds(retry-last)), reason)
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
//
// A fitted curve is of the last minutes, the rate of now. Where they contradict each
// other, the guest is taken to write the same pages as before, faster or more slowly.
func curve(s *policy.Signals) formula.Curve {
	m := s.GetMemory()
	rate := m.GetDirtyPagesPerSecond()
	known := rate > 0 && !math.IsInf(rate, 1)
	if m.GetGPages() > 0 && !math.IsInf(m.GetGPages(), 1) && m.GetGTauNs() >= 0 {
		c := formula.Curve{Pages: m.GetGPages(), Tau: m.GetGTauNs() / second}
		fitted := c.Dirty(1)
		if off := math.Abs(rate - fitted); known && c.Tau > 0 && off > max(tolerance*fitted, 2*m.GetErrorPagesPerSecond()) {
			c.Tau *= fitted / min(rate, c.Pages)
		}
		return c
	}
	if !known {
		return formula.Curve{}
	}
	pages := float64(max(m.GetWssBytes(), s.GetVm().GetUsedBytes())) / pageBytes
	if pages < rate {
		pages = max(rate, float64(s.GetVm().GetRamBytes())/pageBytes)
	}
	return formula.Curve{Pages: pages, Tau: pages / rate}
}

const (
	pageBytes = 4096
	// tolerance is how far a rate over a second may be off the curve before it contradicts it.
	tolerance = 0.25
)

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

// bytesPerPage is what a written page takes in the store.
func bytesPerPage(s *policy.Signals) float64 {
	m := s.GetMemory()
	ratio := m.GetCompressRatio()
	if ratio <= 0 || ratio > 1 {
		ratio = 1
	}
	return pageBytes * ratio * (1 - min(max(m.GetZeroShare()+m.GetFalseDirtyShare()+m.GetDuplicateShare(), 0), 0.99))
}
