package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// gerofi fires at the first of several budgets: pages written, age of output that is
// held, bytes written to disks, time.
type gerofi struct {
	dirtyBytes, age, diskBytes, shortest, longest float64
	params                                        []*policy.Param
}

// NewGerofi makes the policy `gerofi`.
func NewGerofi(given map[string]string) (policy.Policy, error) {
	p := read(given)
	g := &gerofi{dirtyBytes: p.number("dirty-bytes", 256<<20, "of memory written"),
		age:       p.duration("output-age", 50*time.Millisecond, "output may be held"),
		diskBytes: p.number("disk-bytes", 64<<20, "written to disks"),
		shortest:  p.duration("shortest", 5*time.Second, "never more often, but for held output"),
		longest:   p.duration("longest", 15*time.Minute, "never wait longer")}
	g.params = p.known
	return g, p.done()
}

func (g *gerofi) Describe() *policy.Description {
	return &policy.Description{Name: "gerofi", Version: "1", Formula: "the first of: G(T) = dirty budget, oldest held output, disk budget, longest",
		Source: "after Gerofi and Ishikawa, PRDC 2011: interval from dirtied pages, disk operations, packets and bandwidth", Params: g.params}
}

func (g *gerofi) Decide(s *policy.Signals) (*policy.Decision, error) {
	if oldest := s.GetNetwork().GetOldestBufferedNs(); oldest > 0 {
		reason := fmt.Sprintf("output is held since %s ago, %s are allowed", span(seconds(s.GetNowNs()-oldest)), span(g.age))
		t := seconds(oldest-since(s)) + g.age
		return due(s, bounded(s, t, g.longest), reason), nil
	}
	t, why := g.longest, "time"
	if dirty := curve(s).Until(g.dirtyBytes / pageBytes); dirty < t {
		t, why = dirty, "memory written"
	}
	if rate := s.GetDisk().GetWrittenBytesPerSecond(); rate > 0 {
		// What was written already counts from the last checkpoint, as the interval does.
		left := g.diskBytes - float64(s.GetDisk().GetWrittenSinceCheckpointBytes())
		passed := 0.0
		if at := since(s); at > 0 {
			passed = seconds(s.GetNowNs() - at)
		}
		if disk := passed + max(left, 0)/rate; disk < t {
			t, why = disk, "disk writes"
		}
	}
	t = bounded(s, max(t, g.shortest), g.longest)
	return due(s, t, fmt.Sprintf("the budget for %s is used up %s after a checkpoint", why, span(t))), nil
}
