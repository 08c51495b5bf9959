package sa

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/proto/ikev2"
)

const (
	levelDebug = slog.LevelDebug
	levelInfo  = slog.LevelInfo
	levelWarn  = slog.LevelWarn
)

// log emits a line about the IKE SA in use.
func (s *SA) log(l slog.Level, msg string, attrs ...slog.Attr) {
	a := append(make([]slog.Attr, 0, 4+len(attrs)), slog.Any("peer", s.remote))
	if s.cur != nil {
		ini, res := s.cur.spis()
		a = append(a, slog.Any("spi_i", ini), slog.Any("spi_r", res))
	}
	a = append(a, s.attrRule())
	s.emit(Log{l, msg, append(a, attrs...)})
}

func attrErr(err error) slog.Attr { return slog.Any("err", err) }

func attrNotify(t ikev2.NotifyType) slog.Attr { return slog.String("notify", t.String()) }

// attrOffer tells what we asked for: who is refused must see both sides.
func attrOffer(o *offer) slog.Attr {
	return slog.String("offered", fmt.Sprintf("%v mode, %v to %v, %v", o.mode, showTS(o.tsi), showTS(o.tsr), proposal.OfferChild(o.proposals, 0, false).Proposals))
}

func attrChild(c *child) slog.Attr { return slog.String("child", c.String()) }

// levelOf says how loud an end is.
func levelOf(err error) slog.Level {
	var le *LocalError
	if errors.Is(err, ErrClosed) || errors.Is(err, ErrPeerDeleted) || errors.As(err, &le) && le.Notify == ikev2.INVALID_KE_PAYLOAD {
		return levelInfo // the last: the peer asks again
	}
	return levelWarn
}

// attrRule names the rule, which a responder's peer may still turn out not to
// be of until it is authenticated.
func (s *SA) attrRule() slog.Attr {
	if s.rule == nil {
		return slog.String("rule", "")
	}
	return slog.String("rule", s.rule.Label)
}

// ofRule lets an error say by which rule our side wants what it wants.
func ofRule(err error, r *pad.Rule) error {
	var m *proposal.Mismatch
	if errors.As(err, &m) {
		m.Who = fmt.Sprintf("rule %q", r.Label)
	}
	return err
}

// logMessage tells of a message.
func (s *SA) logMessage(dir string, h ikev2.Header, ps []ikev2.Payload, n int) {
	m := Message{Header: h, Dir: dir, Peer: s.remote, Octets: n, Payloads: ps}
	if s.rule != nil {
		m.Rule = s.rule.Label
	}
	s.emit(m)
}

// maxNames bounds what a peer can put into a line.
const maxNames = 32

// Names lists the payloads as RFC 7296 writes them; notifies with their type.
func (m Message) Names() string { return names(m.Payloads) }

func names(ps []ikev2.Payload) string {
	var l []string
	for k, p := range ps {
		if k == maxNames {
			l = append(l, "…")
			break
		}
		if n, ok := p.(*ikev2.Notify); ok {
			l = append(l, "N("+n.Type.String()+")")
		} else {
			l = append(l, p.PayloadType().String())
		}
	}
	return strings.Join(l, ", ")
}

func attrSuite(i *ikeSA) slog.Attr { return slog.String("suite", i.suite.String()) }
