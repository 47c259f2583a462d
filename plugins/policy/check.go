package policy

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"
)

// ErrInvalid is what Check's errors match: the answer is not one a host can act on.
var ErrInvalid = errors.New("invalid decision")

// ErrUnsupported is what Check's errors match if the decision asks for more than the
// host has.
var ErrUnsupported = errors.New("decision asks for what this host does not support")

const (
	maxReason = 1000 // bytes
	maxAhead  = 366 * 24 * time.Hour
	maxBehind = time.Minute // clocks and queues
	// MaxThrottle is the largest share of its processor time a guest may be denied.
	MaxThrottle = 0.9
)

// Check says whether a host with these signals may act on a decision.
func Check(s *Signals, d *Decision) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
	}
	lacks := func(what, name string, has []string) error {
		if name == "" || name == "auto" || slices.Contains(has, name) {
			return nil
		}
		return fmt.Errorf("%w: %s %q (it has %q)", ErrUnsupported, what, name, has)
	}
	if d == nil {
		return bad("none")
	}
	if d.GetReason() == "" || len(d.GetReason()) > maxReason || !utf8.ValidString(d.GetReason()) {
		return bad("a reason of 1 to %d bytes of text is required", maxReason)
	}
	if d.GetWhen() == nil && d.GetAskAgainNs() == 0 {
		return bad("neither a time nor when to ask again")
	}
	now := s.GetNowNs()
	within := func(name string, ns int64) error {
		if ns < now-int64(maxBehind) || ns > now+int64(maxAhead) {
			return bad("%s is %v from now", name, time.Duration(ns-now))
		}
		return nil
	}
	var errs []error
	if d.GetAtNs() != 0 {
		errs = append(errs, within("at_ns", d.GetAtNs()))
	}
	if d.GetAskAgainNs() != 0 {
		errs = append(errs, within("ask_again_ns", d.GetAskAgainNs()))
	}
	if slot := d.GetIdleSlot(); slot != nil {
		errs = append(errs, within("the idle slot's deadline", slot.GetDeadlineNs()))
		if slot.GetNotBeforeNs() > slot.GetDeadlineNs() {
			errs = append(errs, bad("the idle slot begins after its deadline"))
		}
		if !s.GetCapabilities().GetIdleSlots() {
			errs = append(errs, fmt.Errorf("%w: idle slots", ErrUnsupported))
		}
	}
	if iv := d.GetIntervalNs(); iv < 0 || iv != 0 && iv < s.GetCapabilities().GetMinIntervalNs() {
		errs = append(errs, bad("an interval of %v; the least is %v", time.Duration(iv), time.Duration(s.GetCapabilities().GetMinIntervalNs())))
	}
	if th := d.GetThrottleShare(); math.IsNaN(th) || th < 0 || th > MaxThrottle {
		errs = append(errs, bad("a throttle of %v", th))
	} else if th > 0 && !s.GetCapabilities().GetThrottle() {
		errs = append(errs, fmt.Errorf("%w: throttling", ErrUnsupported))
	}
	if d.GetKeep() < 0 || d.GetKeep() != 0 && d.GetKeep() < s.GetCapabilities().GetKeep() {
		errs = append(errs, bad("keep %d is less than the operator's %d", d.GetKeep(), s.GetCapabilities().GetKeep()))
	}
	c := s.GetCapabilities()
	errs = append(errs, lacks("mode", d.GetMode(), c.GetModes()), lacks("engine", d.GetEngine(), c.GetEngines()),
		lacks("compression", d.GetCompression(), c.GetCompressions()))
	return errors.Join(errs...)
}
