package vmstate

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
)

// described is a section in a stream's description.
type described struct {
	Name     string `json:"name"`
	Instance uint32 `json:"instance_id"`
}

// FromTail makes a device state of what follows RAM in a migration stream: device
// sections, end mark, description. The description names the sections in their
// order; with it none is cut at something in a payload that looks like a footer. It
// is left out of the result, for it belongs to the stream.
func FromTail(tail []byte) ([]byte, *Listing, error) {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, headerBytes+len(tail)), magic)
	b = binary.BigEndian.AppendUint32(b, version)
	b = append(b, tail...)
	expected, err := findDescription(tail)
	if err != nil {
		return nil, nil, err
	}
	l, err := parse(b, expected)
	if err != nil {
		return nil, nil, err
	}
	if len(l.Sections) == 0 {
		return nil, nil, fmt.Errorf("%w: no device section follows RAM", ErrFormat)
	}
	last := l.Sections[len(l.Sections)-1]
	return b[:last.Offset+last.Bytes+footerBytes+1], l, nil
}

// findDescription looks for the description at the end of a stream. It is text, so
// that the last byte of its kind of section is that section's, or in its length. Nil
// if there is none, or one that describes nothing, as Stream's.
func findDescription(b []byte) ([]described, error) {
	const inLength = 4 // bytes of the length that may look like it
	end := len(b)
	for range inLength + 1 {
		i := bytes.LastIndexByte(b[:end], typeVMDesc)
		if i < 1 {
			break
		}
		end = i
		if b[i-1] != typeEOF || len(b)-i < 5 || int64(binary.BigEndian.Uint32(b[i+1:])) != int64(len(b)-i-5) {
			continue
		}
		var d struct {
			Devices []described `json:"devices"`
		}
		if err := json.Unmarshal(b[i+5:], &d); err != nil {
			return nil, fmt.Errorf("%w: its description: %w", ErrFormat, err)
		}
		if len(d.Devices) > maxSections {
			return nil, fmt.Errorf("%w: its description names %d sections", ErrFormat, len(d.Devices))
		}
		return d.Devices, nil
	}
	return nil, nil
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
