package order

// Stream spots sequential access in the faults one thread serves: a fault right
// behind what was last brought in doubles the read-ahead, anything else ends it.
// The zero value is ready; a handful of interleaved walks are told apart.
type Stream struct {
	walks [4]walk
	clock uint32
}

type walk struct {
	block  int
	next   uint64 // the page expected next
	ahead  uint64
	used   uint32
	active bool
}

// Fault notes a fault and returns how many pages after it are worth fetching at
// once (0 to limit).
func (s *Stream) Fault(block int, page, limit uint64) uint64 {
	s.clock++
	oldest := 0
	for i := range s.walks {
		w := &s.walks[i]
		// The vCPU may be a little behind or past what was read ahead.
		if w.active && w.block == block && page+2 >= w.next && page <= w.next+2 {
			w.ahead = min(limit, max(2, w.ahead*2))
			w.next = page + 1 + w.ahead
			w.used = s.clock
			return w.ahead
		}
		if s.clock-w.used > s.clock-s.walks[oldest].used {
			oldest = i
		}
	}
	s.walks[oldest] = walk{block: block, next: page + 1, used: s.clock, active: true}
	return 0
}
