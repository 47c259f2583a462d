package vmstate

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
)

// FromTail makes a device state of what follows RAM in a migration stream: device
// sections, end mark, description. The description is left out, for it belongs to
// the stream; before, it is held against the sections that were found.
func FromTail(tail []byte) ([]byte, *Listing, error) {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, headerBytes+len(tail)), magic)
	b = binary.BigEndian.AppendUint32(b, version)
	b = append(b, tail...)
	l, err := Parse(b)
	if err != nil {
		return nil, nil, err
	}
	if len(l.Sections) == 0 {
		return nil, nil, fmt.Errorf("%w: no device section follows RAM", ErrFormat)
	}
	if err := l.checkDescription(); err != nil {
		return nil, nil, err
	}
	last := l.Sections[len(l.Sections)-1]
	return b[:last.Offset+last.Bytes+footerBytes+1], l, nil
}

// checkDescription compares the sections with the description that the writer put
// behind them, if there is one: a section that was cut at something in a payload
// that looks like a footer gives a wrong list.
func (l *Listing) checkDescription() error {
	if len(l.Description) == 0 {
		return nil
	}
	var d struct {
		Devices []struct {
			Name     string `json:"name"`
			Instance uint32 `json:"instance_id"`
		} `json:"devices"`
	}
	if err := json.Unmarshal(l.Description, &d); err != nil {
		return fmt.Errorf("%w: its description: %w", ErrFormat, err)
	}
	if d.Devices == nil {
		return nil // a writer that describes nothing, as Stream
	}
	if len(d.Devices) != len(l.Sections) {
		return fmt.Errorf("%w: %d device sections where its description names %d", ErrFormat, len(l.Sections), len(d.Devices))
	}
	for i, s := range l.Sections {
		if w := d.Devices[i]; w.Name != s.Name || w.Instance != s.Instance {
			return fmt.Errorf("%w: device section %d is %.80q (%d) where its description says %.80q (%d)", ErrFormat, i, s.Name, s.Instance, w.Name, w.Instance)
		}
	}
	return nil
}

// RunState is the run state in a device state's section "globalstate": what a
// loader makes of the machine unless it was told to leave it paused. Empty if there
// is none.
func RunState(deviceState []byte, l *Listing) string {
	for _, s := range l.Sections {
		if s.Name != "globalstate" || s.Bytes < 4 {
			continue
		}
		text := deviceState[s.Offset+4 : s.Offset+s.Bytes] // behind the size of the text
		for i, c := range text {
			if c == 0 {
				return string(text[:i])
			}
		}
	}
	return ""
}
