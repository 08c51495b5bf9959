package sa

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

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
	a := []slog.Attr{slog.String("peer", s.remote.String())}
	if s.cur != nil {
		ini, res := s.cur.spis()
		a = append(a, slog.String("spi_i", ini.String()), slog.String("spi_r", res.String()))
	}
	s.emit(Log{l, msg, append(a, attrs...)})
}

func attrErr(err error) slog.Attr { return slog.Any("err", err) }

func attrNotify(t ikev2.NotifyType) slog.Attr { return slog.String("notify", t.String()) }

// attrOffer tells what we asked for: who is refused must see both sides.
func attrOffer(o *offer) slog.Attr {
	return slog.String("offered", fmt.Sprintf("%v mode, %v to %v, %v", o.mode, o.tsi, o.tsr, proposal.OfferChild(o.proposals, 0, false).Proposals))
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

// logMessage is the one line that every message gets.
func (s *SA) logMessage(dir string, i *ikeSA, h ikev2.Header, ps []ikev2.Payload, n int) {
	kind := "request"
	if h.IsResponse() {
		kind = "response"
	}
	s.emit(Log{levelInfo, dir + " " + h.Exchange.String() + " " + kind, []slog.Attr{
		slog.String("peer", s.remote.String()),
		slog.String("spi_i", h.InitiatorSPI.String()), slog.String("spi_r", h.ResponderSPI.String()),
		slog.Uint64("msgid", uint64(h.MessageID)), slog.Int("bytes", n),
		slog.String("payloads", names(ps)),
	}})
}

// names lists payloads as RFC 7296 writes them; notifies with their type.
func names(ps []ikev2.Payload) string {
	var l []string
	for _, p := range ps {
		if n, ok := p.(*ikev2.Notify); ok {
			l = append(l, "N("+n.Type.String()+")")
		} else {
			l = append(l, p.PayloadType().String())
		}
	}
	return strings.Join(l, ", ")
}

func attrSuite(i *ikeSA) slog.Attr { return slog.String("suite", i.suite.String()) }
