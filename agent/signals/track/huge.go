package track

import (
	"time"

	"github.com/ckagent/ckagent/uffd/pagemap"
)

const hugeBytes = 2 << 20

// noteHuge remembers which huge pages there are: the first write to one that is
// armed splits it.
func (t *Tracker) noteHuge() error {
	q := pagemap.Query{Mask: pagemap.IsHuge | pagemap.IsPresent, Return: pagemap.IsHuge}
	for i := range t.Blocks {
		b := &t.Blocks[i]
		if err := t.pm.ScanAll(b.Start, b.Start+b.Bytes, q, t.regions, func(r pagemap.Region) bool {
			for at := (r.Start + hugeBytes - 1) &^ (hugeBytes - 1); at+hugeBytes <= r.End; at += hugeBytes {
				t.huge = append(t.huge, at)
			}
			return true
		}); err != nil {
			return err
		}
	}
	return nil
}

// collapse makes huge pages whole again that were split while they were armed. It
// is a courtesy: where the kernel has no free huge page, the guest keeps small ones.
func (t *Tracker) collapse() {
	deadline := time.Now().Add(t.c.CollapseBudget)
	var out [1]pagemap.Region
	q := pagemap.Query{Mask: pagemap.IsHuge, Return: pagemap.IsHuge, MaxPages: 1}
	for _, at := range t.huge {
		n, _, err := t.pm.Scan(at, at+hugeBytes, q, out[:])
		if err != nil || time.Now().After(deadline) {
			return
		}
		if n == 0 {
			_ = collapse(t.pidfd, at) // see above
		}
	}
}
