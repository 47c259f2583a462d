package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/ckagent/ckagent/agent/problem"
)

// A manifest ends with its own checksum, at a fixed distance from the end, taken
// over the whole file with the sixteen digits set to '0'. The file stays plain
// JSON, and a reader can check it before parsing anything.
const (
	trailerHead  = "  \"checksum\": \"" + checksumPrefix
	trailerTail  = "\"\n}\n"
	trailerZeros = "0000000000000000"
	trailerBytes = len(trailerHead) + len(trailerZeros) + len(trailerTail)
)

// EncodeManifest renders a manifest after validating it.
func EncodeManifest(m *Manifest) ([]byte, error) {
	const op = "encode manifest"
	c := *m
	// A nil slice would be null, which no reader accepts.
	if c.Requires == nil {
		c.Requires = []string{}
	}
	if c.Machine.Argv == nil {
		c.Machine.Argv = []string{}
	}
	if c.Segments == nil {
		c.Segments = []Segment{}
	}
	if c.HasDisks() {
		c.Disks = slices.Clone(c.Disks)
		for i := range c.Disks {
			if c.Disks[i].Volumes == nil {
				c.Disks[i].Volumes = []Volume{}
			}
		}
		if !slices.Contains(c.Requires, FeatureDisks) {
			c.Requires = append(slices.Clone(c.Requires), FeatureDisks)
		}
	}
	if c.needsChain() && !slices.Contains(c.Requires, FeatureChain) {
		c.Requires = append(slices.Clone(c.Requires), FeatureChain)
	}
	c.CreatedAt = c.CreatedAt.UTC().Round(0)
	if err := c.Validate(); err != nil {
		return nil, problem.New(problem.Failed, op, m.ID, "%w", err)
	}
	// A name that is no UTF-8 would come back changed: say so now.
	for _, s := range manifestStrings(&c) {
		if !utf8.ValidString(s) {
			return nil, problem.New(problem.Refused, op, m.ID, "%.80q is not UTF-8", s)
		}
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(&c); err != nil {
		return nil, problem.New(problem.Failed, op, m.ID, "%w", err)
	}
	body, ok := bytes.CutSuffix(b.Bytes(), []byte("\n}\n"))
	if !ok {
		return nil, problem.New(problem.Failed, op, m.ID, "unexpected end of the encoding")
	}
	body = append(body, ",\n"+trailerHead+trailerZeros+trailerTail...)
	if len(body) > MaxManifestBytes {
		return nil, problem.New(problem.Refused, op, m.ID, "%d bytes: more than %d", len(body), MaxManifestBytes)
	}
	seal(body)
	// Nothing is committed that this very program would not read back.
	if _, err := DecodeManifest("new manifest", body); err != nil {
		return nil, problem.New(problem.Failed, op, m.ID, "would not be readable: %v", err)
	}
	return body, nil
}

func manifestStrings(m *Manifest) []string {
	s := []string{m.Mode, m.Engine, m.Writer, m.QEMU.Version, m.QEMU.Package, m.QEMU.BinaryPath,
		m.Machine.CPUModel, m.Machine.RTC, m.Machine.LibvirtXML, m.Machine.Cwd, m.Machine.Root}
	s = append(s, m.Machine.Argv...)
	s = append(s, m.Machine.Changes...)
	s = append(s, m.Machine.Redacted...)
	for _, e := range m.Machine.Env {
		s = append(s, e.Name, e.Value)
	}
	for _, b := range m.Blocks {
		s = append(s, b.Path)
	}
	return s
}

// seal writes the checksum into an encoded manifest that has a trailer.
func seal(data []byte) {
	digits := data[len(data)-len(trailerTail)-16 : len(data)-len(trailerTail)]
	copy(digits, trailerZeros)
	copy(digits, fmt.Sprintf("%016x", uint64(Sum(data))))
}

// DecodeManifest checks and decodes a manifest. path is for errors only.
// A damaged one is problem.Integrity, one of a later version problem.Refused.
func DecodeManifest(path string, data []byte) (*Manifest, error) {
	const op = "read manifest"
	if len(data) > MaxManifestBytes {
		return nil, corrupt(op, path, "%d bytes: more than %d", len(data), MaxManifestBytes)
	}
	if err := checkSeal(path, data); err != nil {
		return nil, err
	}
	if err := checkTokens(data); err != nil {
		return nil, corrupt(op, path, "%w", err)
	}
	// Nearly every manifest is of this very version: decode it strictly, and ask
	// what it is only if that fails.
	m, err := decodeBody(data, true)
	if err == nil && m.Version == FormatMajor && m.Format == FormatName && len(m.Requires) == 0 {
		if err := m.Validate(); err != nil {
			return nil, corrupt(op, path, "%w", err)
		}
		return m, nil
	}
	return decodeOther(op, path, data)
}

// decodeOther decodes a manifest that is not plainly of this version.
func decodeOther(op, path string, data []byte) (*Manifest, error) {
	var head struct {
		Format   string   `json:"format"`
		Version  int      `json:"version"`
		Minor    int      `json:"minor"`
		Requires []string `json:"requires"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, corrupt(op, path, "%w", err)
	}
	if head.Format != FormatName {
		return nil, corrupt(op, path, "format %.40q: expected %s", head.Format, FormatName)
	}
	if head.Version > FormatMajor {
		return nil, problem.New(problem.Refused, op, path,
			"a manifest from the future: version %d.%d, this ckagent reads up to %d", head.Version, head.Minor, FormatMajor).
			WithHint("use the ckagent that wrote it, or a newer one")
	}
	for _, f := range head.Requires {
		if !knownFeatures[f] {
			return nil, problem.New(problem.Refused, op, path,
				"a manifest from the future: it requires %.60q, which this ckagent does not know", f).
				WithHint("use the ckagent that wrote it, or a newer one")
		}
	}
	// Every field of a known minor version is known here, so another one is damage
	// or a mistake. A later minor version may add fields that can be ignored.
	m, err := decodeBody(data, head.Minor <= FormatMinor)
	if err == nil {
		err = m.Validate()
	}
	if err != nil {
		return nil, corrupt(op, path, "%w", err)
	}
	return m, nil
}

func decodeBody(data []byte, strict bool) (*Manifest, error) {
	m := struct {
		Manifest
		Checksum string `json:"checksum"`
	}{}
	dec := json.NewDecoder(bytes.NewReader(data))
	if strict {
		dec.DisallowUnknownFields()
	}
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	return &m.Manifest, nil
}

func checkSeal(path string, data []byte) error {
	const op = "read manifest"
	if len(data) < trailerBytes {
		return corrupt(op, path, "%d bytes: cut off", len(data))
	}
	trailer := string(data[len(data)-trailerBytes:])
	digits := trailer[len(trailerHead) : len(trailerHead)+16]
	if !strings.HasPrefix(trailer, trailerHead) || !strings.HasSuffix(trailer, trailerTail) {
		return corrupt(op, path, "does not end with its checksum: cut off or overwritten")
	}
	zeroed := bytes.Clone(data)
	seal(zeroed)
	want := string(zeroed[len(data)-len(trailerTail)-16 : len(data)-len(trailerTail)])
	if digits != want {
		return corrupt(op, path, "checksum is %s, its content gives %s", digits, want)
	}
	return nil
}

// checkTokens refuses what encoding/json lets pass and two readers might
// understand differently: a key twice in one object (letter case aside, since
// encoding/json ignores it), deep nesting, anything after the object, null.
func checkTokens(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	type level struct {
		keys  map[string]bool // nil in an array
		value bool            // in an object: the next token is a value
	}
	var stack []level
	for {
		off := dec.InputOffset()
		tok, err := dec.Token()
		if err == io.EOF && len(stack) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("at offset %d: %w", off, err)
		}
		if len(stack) == 0 && (tok != json.Delim('{') || off != 0) {
			return fmt.Errorf("at offset %d: not one JSON object", off)
		}
		top := len(stack) - 1
		if top >= 0 && stack[top].keys != nil && !stack[top].value && tok != json.Delim('}') {
			key := strings.ToLower(tok.(string))
			if stack[top].keys[key] {
				return fmt.Errorf("at offset %d: key %.40q appears twice", off, key)
			}
			stack[top].keys[key] = true
			stack[top].value = true
			continue
		}
		if top >= 0 {
			stack[top].value = false
		}
		switch tok {
		case json.Delim('{'), json.Delim('['):
			if len(stack) == maxJSONDepth {
				return fmt.Errorf("at offset %d: nested deeper than %d", off, maxJSONDepth)
			}
			l := level{}
			if tok == json.Delim('{') {
				l.keys = map[string]bool{}
			}
			stack = append(stack, l)
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:top]
			if top == 0 && len(bytes.TrimSpace(data[dec.InputOffset():])) > 0 {
				return fmt.Errorf("at offset %d: something follows the object", dec.InputOffset())
			}
		case nil:
			return fmt.Errorf("at offset %d: null", off)
		}
	}
}
