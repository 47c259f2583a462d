package export

import (
	"encoding/binary"
	"encoding/xml"
	"errors"
	"io"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// The head of a libvirt save image (struct virQEMUSaveHeader), in the byte order of
// the host; libvirt reads either.
const (
	saveMagic      = "LibvirtQemudSave"
	saveVersion    = 2
	saveFormatRaw  = 0
	saveHeadBytes  = 16 + 5*4 + 14*4
	savePadding    = 64 << 10 // room for an XML edited with virsh save-image-edit
	maxLibvirtXML  = 8 << 20
	domainElement  = "domain"
	libvirtXMLHint = "give it: --xml FILE (virsh dumpxml --security-info --migratable DOMAIN while it is defined)"
)

// writeLibvirt writes a save image: head, domain XML, migration stream.
func writeLibvirt(x *exporter) error {
	text := x.o.XML
	if text == "" {
		text = x.m.Machine.LibvirtXML
	}
	if x.o.XML == "" && x.m.Machine.Facts[image.FactLibvirtSecrets] != "" {
		// Not with a gap in it: the domain would come back without a password.
		return x.refuse("the recorded domain XML is without the domain's passwords").WithHint("%s", libvirtXMLHint)
	}
	if text == "" {
		return x.refuse("no domain XML is recorded: libvirt did not manage the VM, or was not asked").WithHint("%s", libvirtXMLHint)
	}
	if err := checkDomain(text); err != nil {
		return problem.New(problem.Usage, "export", "domain XML", "%w", err).WithHint("%s", libvirtXMLHint)
	}
	stream, err := x.stream()
	if err != nil {
		return err
	}
	if _, err := x.w.Write(saveHead(text, !x.sum.Paused)); err != nil {
		return err
	}
	return stream.write(x)
}

// checkDomain sees to it that libvirt will find one well-formed domain.
func checkDomain(text string) error {
	if len(text) > maxLibvirtXML || strings.ContainsRune(text, 0) {
		return errors.New("too long, or binary")
	}
	d := xml.NewDecoder(strings.NewReader(text))
	root := ""
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if e, ok := t.(xml.StartElement); ok && root == "" {
			root = e.Name.Local
		}
	}
	if root != domainElement {
		return errors.New("its root is not <domain>")
	}
	return nil
}

// saveHead is everything before the stream. The padding after the XML is libvirt's
// own habit.
func saveHead(text string, running bool) []byte {
	dataBytes := len(text) + 1 + savePadding
	b := make([]byte, saveHeadBytes+dataBytes)
	copy(b, saveMagic)
	state := uint32(0)
	if running {
		state = 1
	}
	for i, v := range []uint32{saveVersion, uint32(dataBytes), state, saveFormatRaw} {
		binary.NativeEndian.PutUint32(b[len(saveMagic)+4*i:], v)
	}
	copy(b[saveHeadBytes:], text)
	return b
}
