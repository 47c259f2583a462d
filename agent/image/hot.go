package image

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// HotRuns is a list of page runs that reads and writes itself as one JSON string,
// "block:first+pages,...": a restore parses thousands of them before the guest
// runs, and a string costs a tenth of what JSON arrays do.
type HotRuns []PageRun

// MarshalJSON implements json.Marshaler.
func (h HotRuns) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 2+len(h)*16)
	b = append(b, '"')
	for i, r := range h {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, int64(r.Block), 10)
		b = append(b, ':')
		b = strconv.AppendUint(b, r.First, 10)
		b = append(b, '+')
		b = strconv.AppendUint(b, r.Pages, 10)
	}
	return append(b, '"'), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (h *HotRuns) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	*h = nil
	for s != "" {
		if len(*h) == MaxHotRuns {
			return fmt.Errorf("more than %d hot runs", MaxHotRuns)
		}
		var r PageRun
		block, rest, ok := cutNumber(s, ':')
		if !ok || block >= MaxBlocks {
			return fmt.Errorf("hot run %d: bad block", len(*h))
		}
		r.Block = int(block)
		if r.First, rest, ok = cutNumber(rest, '+'); !ok {
			return fmt.Errorf("hot run %d: bad first page", len(*h))
		}
		if r.Pages, rest, ok = cutNumber(rest, ','); !ok {
			return fmt.Errorf("hot run %d: bad length", len(*h))
		}
		*h = append(*h, r)
		s = rest
	}
	return nil
}

// cutNumber reads a decimal number up to end. The last number of a list may lack
// its comma; a comma must be followed by something.
func cutNumber(s string, end byte) (v uint64, rest string, ok bool) {
	i := 0
	for i < len(s) && s[i] != end {
		d := s[i] - '0'
		if d > 9 || v > 1<<50 || (i > 0 && v == 0) {
			return 0, "", false
		}
		v = v*10 + uint64(d)
		i++
	}
	if i == 0 || (i == len(s) && end != ',') || (i == len(s)-1 && end == ',') {
		return 0, "", false
	}
	if i < len(s) {
		i++
	}
	return v, s[i:], true
}
