package faultserver

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd/pagemap"
)

const madvCollapse = 25 // MADV_COLLAPSE, Linux 6.1

// collapse makes huge pages whole again that were split while they were armed,
// for as long as the configuration allows. It is a courtesy: where the kernel
// has no free huge page or lacks the call, the guest keeps small pages.
func (s *server) collapse() {
	if s.stats.HugeBefore == 0 {
		return
	}
	pidfd, err := unix.PidfdOpen(s.cfg.QEMUPID, 0)
	if err != nil {
		return
	}
	defer unix.Close(pidfd)
	deadline := time.Now().Add(s.cfg.Collapse)
	for _, t := range s.tables {
		if t.whole { // they are never split
			continue
		}
		for g := range t.block.Pages / hugePages {
			if !t.isHuge(g*hugePages) || s.isMappedHuge(t, g) {
				continue
			}
			s.stats.HugeSplit++
			if time.Now().After(deadline) {
				continue
			}
			if processMadvise(pidfd, t.block.HVA+g*hugePages*pageBytes, hugePages*pageBytes, madvCollapse) == nil {
				s.stats.HugeCollapsed++
			}
		}
	}
}

// isMappedHuge reports whether huge page g is mapped as one now.
func (s *server) isMappedHuge(t *pageTable, g uint64) bool {
	var out [1]pagemap.Region
	start := t.block.HVA + g*hugePages*pageBytes
	n, _, err := s.pm.Scan(start, start+hugePages*pageBytes,
		pagemap.Query{Mask: pagemap.IsHuge, Return: pagemap.IsHuge, MaxPages: 1}, out[:])
	return err == nil && n > 0
}
