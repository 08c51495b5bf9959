package explain

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/missiu/missiu/proto/isakmp"
)

// Config is what captures are held against.
type Config struct {
	Rules []*pad.Rule
	// Local are our addresses; none: each address is taken for ours.
	Local []netip.Addr
	// IKEPort and NATTPort are ours.
	IKEPort, NATTPort uint16
}

// Bounds of what is told.
const (
	maxMessages = 1000 // of a capture
	maxRules    = 20   // of a message
	maxOffers   = 20   // proposals of a message
)

// ErrNothing: there is no IKE_SA_INIT in the capture.
var ErrNothing = errors.New("no IKE_SA_INIT in it")

var errEnough = errors.New("enough")

// Capture reads a capture in pcap or pcapng format and writes what would become
// of each IKE_SA_INIT in it, and of what has another version. Of one that was sent
// again it tells once. Errors are of the file, of w, or ErrNothing.
func Capture(w io.Writer, r io.Reader, c Config) error {
	seen := map[[sha256.Size]byte]int{}
	alien := map[uint32]bool{}
	inits := 0
	err := frames(r, func(n int, link uint32, data []byte) error {
		d, ok := datagramOf(link, data)
		if !ok {
			if !known(link) {
				alien[link] = true
			}
			return nil
		}
		body, ok := c.message(d)
		if !ok {
			return nil
		}
		h, major, ok := header(body)
		if !ok {
			return nil
		}
		if major == 2 {
			inits++
		}
		var err error
		key := sha256.Sum256(fmt.Appendf(nil, "%v %v %x", d.src, d.dst, body))
		var b strings.Builder
		switch first, again := seen[key]; {
		case again:
			fmt.Fprintf(&b, "frame %d: frame %d again\n", n, first)
		case len(seen) >= maxMessages:
			fmt.Fprintf(&b, "more than %d messages; the rest is left out\n", maxMessages)
			err = errEnough
		default:
			seen[key] = n
			if major == 2 {
				c.tell(&b, n, d, h, bytes.Clone(body))
			} else {
				c.otherVersion(&b, n, d, h, major)
			}
		}
		if _, werr := io.WriteString(w, b.String()); werr != nil {
			return werr
		}
		return err
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	if err == nil && inits == 0 {
		if len(alien) > 0 {
			return fmt.Errorf("%w, and frames of link types that are not known here: %v", ErrNothing, slices.Sorted(maps.Keys(alien)))
		}
		return ErrNothing
	}
	return err
}

// header reads the header of an IKE_SA_INIT, or of the first message by another
// version. Whether the length in it is right, Parse tells.
func header(b []byte) (h ikev2.Header, major uint8, ok bool) {
	if len(b) < isakmp.HeaderLen {
		return h, 0, false
	}
	head := bytes.Clone(b[:isakmp.HeaderLen])
	binary.BigEndian.PutUint32(head[24:], isakmp.HeaderLen)
	h, _, err := ikev2.ParseHeader(head)
	if major = head[17] >> 4; major != 2 {
		return h, major, errors.Is(err, ikev2.ErrVersion) && major != 0 && h.InitiatorSPI != 0 && h.ResponderSPI == 0
	}
	return h, major, err == nil && h.Exchange == ikev2.IKE_SA_INIT
}

// message takes the IKE message out of a datagram of an IKE port.
func (c *Config) message(d datagram) (b []byte, ok bool) {
	at := func(port uint16) bool { return d.src.Port() == port || d.dst.Port() == port }
	switch {
	case at(4500) || at(c.NATTPort): // behind the non-ESP marker (RFC 3948, 2.2)
		return bytes.CutPrefix(d.data, make([]byte, 4))
	case at(500) || at(c.IKEPort):
		return d.data, true
	}
	return nil, false
}

func (c *Config) ours(a netip.Addr) bool { return len(c.Local) == 0 || slices.Contains(c.Local, a) }

// tell explains one message.
func (c *Config) tell(b *strings.Builder, n int, d datagram, h ikev2.Header, data []byte) {
	kind := "request"
	if h.IsResponse() {
		kind = "response"
	}
	fmt.Fprintf(b, "frame %d: %v to %v, IKE_SA_INIT %s, SPIs %v and %v, %d octets\n", n, d.src, d.dst, kind, h.InitiatorSPI, h.ResponderSPI, len(data))
	if d.cut {
		b.WriteString("  only a part of it is here: a fragment of IP, or cut off by the capture\n")
		return
	}
	m, err := ikev2.Parse(data)
	if err != nil {
		fmt.Fprintf(b, "  malformed: %v: dropped\n", err)
		return
	}
	offer(b, m)
	switch {
	case h.IsResponse() && c.ours(d.dst.Addr()):
		c.response(b, d, m)
	case !h.IsResponse() && c.ours(d.dst.Addr()):
		c.request(b, d, m, data)
	default:
		fmt.Fprintf(b, "  %v is not an address of ours\n", d.dst.Addr())
	}
}

// otherVersion explains a first message by another version (RFC 7296, 2.5).
func (c *Config) otherVersion(b *strings.Builder, n int, d datagram, h ikev2.Header, major uint8) {
	fmt.Fprintf(b, "frame %d: %v to %v, IKE version %d, SPI %v\n", n, d.src, d.dst, major, h.InitiatorSPI)
	switch {
	case !c.ours(d.dst.Addr()):
		fmt.Fprintf(b, "  %v is not an address of ours\n", d.dst.Addr())
	case major > 2 && !h.IsResponse():
		fmt.Fprintf(b, "  answer: N(%v)\n", ikev2.INVALID_MAJOR_VERSION)
	default:
		b.WriteString("  no answer: version 2 alone is spoken here\n")
	}
}

// offer lists what the message proposes.
func offer(b *strings.Builder, m *ikev2.Message) {
	for _, p := range m.Payloads {
		switch p := p.(type) {
		case *ikev2.SA:
			for i, o := range p.Proposals {
				if i == maxOffers {
					b.WriteString("  …\n")
					break
				}
				fmt.Fprintf(b, "  proposal %d: %s\n", o.Number, brief(o))
			}
		case *ikev2.KE:
			fmt.Fprintf(b, "  key exchange: %v, %d octets\n", p.Method, len(p.Data))
		case *ikev2.Notify:
			fmt.Fprintf(b, "  notify: %v, %d octets\n", p.Type, len(p.Data))
		}
	}
}

func brief(p ikev2.Proposal) string {
	const most = 64
	more := ""
	if len(p.Transforms) > most {
		p.Transforms, more = p.Transforms[:most], "/…"
	}
	return p.String() + more
}

// request tells how we answer as responder.
func (c *Config) request(b *strings.Builder, d datagram, m *ikev2.Message, data []byte) {
	local, peer := d.dst, d.src
	nat(b, d, m)
	offered := ikev2.Find[*ikev2.SA](m.Payloads)
	var candidates []*pad.Rule
	shown := 0
	for _, r := range c.Rules {
		ok, why := covers(r, local.Addr(), peer.Addr())
		if !ok {
			if why != "" {
				fmt.Fprintf(b, "  rule %q: %s\n", r.Label, why)
			}
			continue
		}
		if candidates = append(candidates, r); offered == nil || shown == maxRules {
			continue
		}
		shown++
		verdict(b, r, m)
	}
	if len(candidates) == 0 {
		fmt.Fprintf(b, "  no rule is for %v with %v\n  answer: N(%v)\n", local.Addr(), peer.Addr(), ikev2.NO_PROPOSAL_CHOSEN)
		return
	}
	s := sa.NewResponder(sa.Config{Local: local, Remote: peer, IKEPort: c.IKEPort, NATTPort: c.NATTPort, Host: nobody{},
		Rand: rand.NewChaCha8([32]byte{})}, candidates) // nothing of it is sent: the same capture, the same words
	outs := s.Receive(time.Now(), sa.Datagram{Local: local, Remote: peer, Data: data})
	told := false
	for _, o := range outs {
		switch o := o.(type) {
		case sa.Send:
			if a, err := ikev2.Parse(o.Data); err == nil {
				told = true
				answer(b, a)
			}
		case sa.Failed:
			fmt.Fprintf(b, "  refused: %v\n", o.Err)
		}
	}
	if !told {
		b.WriteString("  no answer\n")
	}
	if s.Status().State == sa.StateHalfOpen {
		suite := s.Status().Suite
		var l []string
		for _, r := range candidates {
			if proposal.ContainsIKE(r.Proposals, suite) && len(l) < maxRules {
				l = append(l, fmt.Sprintf("%q, %v, peer %s%s", r.Label, r.RemoteAuth, wanted(r), ipcomp(r)))
			}
		}
		fmt.Fprintf(b, "  IKE_AUTH decides by identity and method which rule it is: %s\n", strings.Join(l, "; "))
	}
	s.Drop(time.Now(), sa.ErrClosed)
}

// covers: a rule for host names may be for any peer, since nothing is looked up.
func covers(r *pad.Rule, local, peer netip.Addr) (ok bool, why string) {
	if r.Covers(local, peer) {
		return true, ""
	}
	if len(r.RemoteHosts) > 0 {
		q := *r
		q.Remote = pad.Any()
		if q.Covers(local, peer) {
			return false, fmt.Sprintf("for %s, whose addresses are not looked up here", strings.Join(r.RemoteHosts, ", "))
		}
	}
	return false, ""
}

// verdict tells what a rule makes of the offer of m: of the whole, and of each
// proposal.
func verdict(b *strings.Builder, r *pad.Rule, m *ikev2.Message) {
	offered, mine := ikev2.Find[*ikev2.SA](m.Payloads), r.Proposals
	if ikev2.FindNotify(m.Payloads, ikev2.INTERMEDIATE_EXCHANGE_SUPPORTED) == nil {
		mine = proposal.WithoutAddKE(mine)
	}
	suite, _, peer, err := proposal.ChooseIKE(mine, offered, 0)
	if err == nil {
		fmt.Fprintf(b, "  rule %q: proposal %d, %v\n", r.Label, peer.Number, suite)
	} else {
		fmt.Fprintf(b, "  rule %q: none\n", r.Label)
	}
	ours := proposal.OfferIKE(mine, nil).Proposals
	for i, p := range offered.Proposals {
		if i == maxOffers {
			return
		}
		one := &ikev2.SA{Proposals: []ikev2.Proposal{p}}
		if s, _, _, err := proposal.ChooseIKE(mine, one, 0); err != nil {
			fmt.Fprintf(b, "    proposal %d: no: %s\n", p.Number, proposal.Difference(fmt.Sprintf("rule %q", r.Label), ours, one.Proposals))
		} else {
			fmt.Fprintf(b, "    proposal %d: would do, %v\n", p.Number, s)
		}
	}
}

func wanted(r *pad.Rule) string {
	if len(r.RemoteIDs) == 0 {
		return "any address"
	}
	return fmt.Sprint(r.RemoteIDs)
}

func ipcomp(r *pad.Rule) string {
	if r.IPComp {
		return ", with IPComp in child SAs if the peer offers DEFLATE"
	}
	return ""
}

// answer tells what a message of ours says.
func answer(b *strings.Builder, m *ikev2.Message) {
	var l []string
	for _, p := range m.Payloads {
		switch p := p.(type) {
		case *ikev2.SA:
			for _, o := range p.Proposals {
				l = append(l, fmt.Sprintf("SA(%d: %v)", o.Number, o))
			}
		case *ikev2.KE:
			l = append(l, fmt.Sprintf("KE(%v)", p.Method))
		case *ikev2.Notify:
			if p.Type == ikev2.INVALID_KE_PAYLOAD && len(p.Data) == 2 {
				l = append(l, fmt.Sprintf("N(%v: try %v)", p.Type, ikev2.KEID(binary.BigEndian.Uint16(p.Data))))
				continue
			}
			l = append(l, fmt.Sprintf("N(%v)", p.Type))
		default:
			l = append(l, p.PayloadType().String())
		}
	}
	fmt.Fprintf(b, "  answer: %s\n", strings.Join(l, ", "))
}

// nat tells what the NAT detection notifies of a request say about the addresses
// that it came with (RFC 7296, 2.23).
func nat(b *strings.Builder, d datagram, m *ikev2.Message) {
	hash := func(a netip.AddrPort) []byte {
		h := sha1.New()
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(m.InitiatorSPI)))
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(m.ResponderSPI)))
		h.Write(a.Addr().AsSlice())
		h.Write(binary.BigEndian.AppendUint16(nil, a.Port()))
		return h.Sum(nil)
	}
	for _, x := range []struct {
		typ  ikev2.NotifyType
		at   netip.AddrPort
		what string
	}{
		{ikev2.NAT_DETECTION_SOURCE_IP, d.src, "the sender"},
		{ikev2.NAT_DETECTION_DESTINATION_IP, d.dst, "the receiver"},
	} {
		has, same := false, false
		for _, p := range m.Payloads {
			if n, ok := p.(*ikev2.Notify); ok && n.Type == x.typ {
				has, same = true, same || bytes.Equal(n.Data, hash(x.at))
			}
		}
		if has && !same {
			fmt.Fprintf(b, "  %s is behind a NAT, or says so: not %v itself\n", x.what, x.at)
		}
	}
}

// response tells what we make of an answer as initiator.
func (c *Config) response(b *strings.Builder, d datagram, m *ikev2.Message) {
	local, peer := d.dst.Addr(), d.src.Addr()
	var rule *pad.Rule
	for _, r := range c.Rules {
		if r.StartAction != pad.StartNone && r.Covers(local, peer) {
			rule = r
			break
		}
	}
	if rule == nil {
		fmt.Fprintf(b, "  no rule would have us ask %v from %v\n", peer, local)
		return
	}
	ours := proposal.OfferIKE(rule.Proposals, nil).Proposals
	switch chosen := ikev2.Find[*ikev2.SA](m.Payloads); {
	case chosen != nil:
		if suite, err := proposal.CheckIKE(rule.Proposals, chosen, 0); err == nil {
			fmt.Fprintf(b, "  rule %q: accepted, %v\n", rule.Label, suite)
		} else {
			fmt.Fprintf(b, "  rule %q: %v: %s\n", rule.Label, err, proposal.Difference(fmt.Sprintf("rule %q", rule.Label), ours, chosen.Proposals))
		}
	case ikev2.FindNotify(m.Payloads, ikev2.COOKIE) != nil:
		fmt.Fprintf(b, "  rule %q: asked again with the cookie\n", rule.Label)
	case ikev2.FindNotify(m.Payloads, ikev2.INVALID_KE_PAYLOAD) != nil:
		fmt.Fprintf(b, "  rule %q: asked again with that method, if it is one of ours\n", rule.Label)
		offers(b, ours)
	default:
		fmt.Fprintf(b, "  rule %q: refused; it offers\n", rule.Label)
		offers(b, ours)
	}
}

func offers(b *strings.Builder, ps []ikev2.Proposal) {
	for _, p := range ps {
		fmt.Fprintf(b, "    %d: %v\n", p.Number, p)
	}
}

// nobody is the host of a machine that goes no further than IKE_SA_INIT.
type nobody struct{}

func (nobody) Policies(sa.Query) []sa.Policy { return nil }
func (nobody) Admit(sa.Peer) (bool, error)   { return false, errors.New("nobody is here") }
