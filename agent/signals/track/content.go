package track

import (
	"bytes"

	"github.com/cespare/xxhash/v2"
	"github.com/klauspost/compress/s2"

	"github.com/ckagent/ckagent/agent/signals/estimate"
)

// content looks at some of the sampled pages before and after a window.
type content struct {
	t      *Tracker
	room   int // pages per window
	makeup estimate.Makeup
	watch  map[uint64]watched // page -> as it was
	order  []uint64
	hashes map[uint64]uint64 // content -> a page that held it when it was looked at
	page   [pageBytes]byte
	packed []byte
}

type watched struct {
	hash    uint64
	weight  float64
	written bool
}

// maxHashes bounds the memory of contents seen.
const maxHashes = 1 << 16

var zeroPage [pageBytes]byte

func newContent(t *Tracker, room int) *content {
	return &content{t: t, room: room, watch: map[uint64]watched{}, hashes: map[uint64]uint64{}, packed: make([]byte, s2.MaxEncodedLen(pageBytes))}
}

// before reads pages of those units that are likely to be written, one of each
// until there is room no more. They exist already, so that reading does not make
// any appear.
func (c *content) before(units []estimate.Unit) error {
	clear(c.watch)
	c.order = c.order[:0]
	hot := 0
	for _, u := range units {
		if u.Hot() {
			hot++
		}
	}
	step := max(1, (hot+c.room-1)/max(c.room, 1))
	seen := 0
	for _, u := range units {
		if !u.Hot() {
			continue
		}
		if seen++; seen%step != 0 {
			continue
		}
		first := uint64(u.Index) * unitPages
		// Which of the unit's pages does not matter, as long as it is not always the
		// same one.
		p := first + uint64(seen*7)%unitPages
		if p >= c.t.pages {
			continue
		}
		if err := c.t.Read(p, c.page[:]); err != nil {
			return err
		}
		c.watch[p] = watched{hash: xxhash.Sum64(c.page[:]), weight: u.Weight}
		c.order = append(c.order, p)
	}
	return nil
}

func (c *content) written(p uint64) {
	if w, ok := c.watch[p]; ok {
		w.written = true
		c.watch[p] = w
	}
}

// after reads what was written again.
func (c *content) after() error {
	c.makeup.Window()
	if len(c.hashes) > maxHashes {
		clear(c.hashes)
	}
	for _, p := range c.order {
		w := c.watch[p]
		if !w.written {
			c.hashes[w.hash] = p
			continue
		}
		if err := c.t.Read(p, c.page[:]); err != nil {
			return err
		}
		h := xxhash.Sum64(c.page[:])
		twin, known := c.hashes[h]
		c.hashes[h] = p
		zero := bytes.Equal(c.page[:], zeroPage[:])
		out := estimate.Written{Weight: w.weight, Zero: zero, Same: h == w.hash, Duplicate: known && twin != p}
		if !zero {
			out.Stored = float64(min(len(s2.Encode(c.packed, c.page[:])), pageBytes)) / pageBytes
		}
		c.makeup.Add(out)
	}
	return nil
}
