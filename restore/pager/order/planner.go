package order

// Why a run was chosen.
type Why uint8

const (
	Hot        Why = iota // written around the checkpoint
	Near                  // next to a recent fault
	Sequential            // its turn
)

func (w Why) String() string { return [...]string{"hot", "near", "sequential"}[w] }

// Options are the sizes a Planner works with, all in pages.
type Options struct {
	Chunk   uint64 // longest run handed out
	Region  uint64 // neighbourhood of a fault, aligned to its size
	Window  uint64 // first step of the neighbourhood; doubles with each further fault in the region
	Regions int    // neighbourhoods remembered; the oldest is forgotten
}

// Defaults are 256 KiB chunks and 2 MiB neighbourhoods opened 64 KiB at a time.
func Defaults() Options {
	return Options{Chunk: 64, Region: 512, Window: 16, Regions: 256}
}

// key names a region.
type key struct {
	block  int
	region uint64
}

// region is a neighbourhood in which faults were seen.
type region struct {
	key
	window uint64 // pages to fetch from the next fault on
	first  uint64 // what is left to fetch
	end    uint64
}

// Planner picks the next run to fetch. One caller at a time.
type Planner struct {
	need   *Need
	o      Options
	hot    []Run
	hotAt  int
	near   []region // newest last
	cursor Run      // Block and First: where the sequential part stands
	claims []Run
	urgent bool
}

// NewPlanner plans over need; hot runs come first, in their order.
func NewPlanner(need *Need, hot []Run, o Options) *Planner {
	d := Defaults()
	if o.Chunk == 0 {
		o.Chunk = d.Chunk
	}
	if o.Region == 0 {
		o.Region = d.Region
	}
	if o.Window == 0 {
		o.Window = d.Window
	}
	if o.Regions == 0 {
		o.Regions = d.Regions
	}
	return &Planner{need: need, o: o, hot: hot}
}

// Fault notes that a guest thread asked for this page.
func (p *Planner) Fault(block int, page uint64) {
	if block < 0 || block >= p.need.Blocks() || page >= p.need.Pages(block) {
		return
	}
	k := key{block, page / p.o.Region}
	r := region{key: k, window: p.o.Window}
	for i := range p.near {
		if p.near[i].key == k {
			r.window = min(p.near[i].window*2, p.o.Region)
			p.near = append(p.near[:i], p.near[i+1:]...)
			break
		}
	}
	start := k.region * p.o.Region
	stop := min(start+p.o.Region, p.need.Pages(block))
	if r.window == p.o.Region {
		r.first, r.end = start, stop
	} else {
		// Mostly what follows, a little of what precedes.
		r.first = max(start, page-min(page, r.window/8))
		r.end = min(stop, page+r.window)
	}
	if len(p.near) == p.o.Regions {
		p.near = append(p.near[:0], p.near[1:]...)
	}
	p.near = append(p.near, r)
}

// Next hands out a run to fetch; the caller ends it with Done. Runs handed out and
// not yet done never overlap. No run: everything offered is settled or handed out.
func (p *Planner) Next() (Run, Why, bool) {
	for p.hotAt < len(p.hot) {
		if r, ok := p.claim(p.hot[p.hotAt]); ok {
			return r, Hot, true
		}
		p.hotAt++
	}
	for i := len(p.near) - 1; i >= 0; i-- {
		n := &p.near[i]
		if n.first >= n.end {
			continue // kept for its window
		}
		if r, ok := p.claim(Run{n.block, n.first, n.end - n.first}); ok {
			return r, Near, true
		}
		n.first = n.end
	}
	if p.urgent {
		return Run{}, 0, false
	}
	// Once around: from the cursor to the end of the last block, and what was put
	// back before it.
	for step := 0; step <= p.need.Blocks(); step++ {
		if p.cursor.Block >= p.need.Blocks() {
			p.cursor = Run{}
		}
		if p.need.Blocks() == 0 {
			break
		}
		b := p.cursor.Block
		if r, ok := p.claim(Run{b, p.cursor.First, p.need.Pages(b) - p.cursor.First}); ok {
			p.cursor.First = r.End()
			return r, Sequential, true
		}
		p.cursor = Run{Block: b + 1}
	}
	return Run{}, 0, false
}

// claim finds the first offered run inside r that no claim covers.
func (p *Planner) claim(r Run) (Run, bool) {
	for r.Pages > 0 {
		found, ok := p.need.Next(r)
		if !ok {
			return Run{}, false
		}
		found.Pages = min(found.Pages, p.o.Chunk)
		for _, c := range p.claims {
			if c.Block != found.Block || c.First >= found.End() || found.First >= c.End() {
				continue
			}
			if c.First > found.First {
				found.Pages = c.First - found.First
				continue
			}
			found.Pages = 0
			r.Pages -= min(r.Pages, c.End()-r.First)
			r.First = c.End()
			break
		}
		if found.Pages > 0 {
			p.claims = append(p.claims, found)
			return found, true
		}
	}
	return Run{}, false
}

// Done ends a run handed out by Next. What the caller did not settle is offered again.
func (p *Planner) Done(r Run) {
	for i, c := range p.claims {
		if c == r {
			p.claims = append(p.claims[:i], p.claims[i+1:]...)
			return
		}
	}
}

// Outstanding is how many runs are handed out.
func (p *Planner) Outstanding() int { return len(p.claims) }

// Again starts over: hot runs and the cursor from the beginning, for pages that
// were held or put back.
func (p *Planner) Again() { p.hotAt, p.cursor = 0, Run{} }

// UrgentOnly stops (or resumes) handing out what is neither hot nor near a fault.
func (p *Planner) UrgentOnly(on bool) { p.urgent = on }
