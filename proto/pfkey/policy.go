package pfkey

import (
	"net/netip"
	"syscall"
)

// Policy is the X_POLICY extension. Requests stand from the inside of the packet
// outwards and only with PolicyIPsec.
type Policy struct {
	Type     PolicyType
	Dir      Dir
	ID       uint32
	Priority uint32 // smaller is stronger
	Requests []Request
}

// Request is one ipsecrequest of a policy.
type Request struct {
	Proto    uint16 // IP protocol number, not an SAType
	Mode     Mode
	Level    Level
	ReqID    uint32
	Src, Dst netip.Addr // both or none; tunnel mode needs them
}

// decode checks form only, since in SPDGET and SPDDELETE2 nothing but the ID
// counts; Check judges the rest.
func (p *Policy) decode(b []byte) error {
	*p = Policy{
		Type: PolicyType(host.Uint16(b[4:])), Dir: Dir(b[6]),
		ID: host.Uint32(b[8:]), Priority: host.Uint32(b[12:]),
	}
	if p.Type != PolicyIPsec {
		return nil
	}
	// Up to 15 octets after the last request are padding, or somebody's mistake.
	for b = b[16:]; len(b) >= lenReqHeader; {
		n := int(host.Uint16(b)) // octets, unlike all other lengths
		if n < lenReqHeader || n > len(b) {
			return invalid("request of %d octets, %d left", n, len(b))
		}
		r := Request{
			Proto: host.Uint16(b[2:]), Mode: Mode(b[4]), Level: Level(b[5]), ReqID: host.Uint32(b[8:]),
		}
		// Transport mode has no use for addresses, but libipsec may send some.
		src, dst, _, err := parsePair(b[lenReqHeader:n])
		if err == nil {
			r.Src, r.Dst = src.Addr(), dst.Addr()
		} else if r.Mode == ModeTunnel || r.Mode == ModeBEET {
			return err
		}
		p.Requests = append(p.Requests, r)
		b = b[n:]
	}
	return nil
}

func (p *Policy) append(b []byte) ([]byte, error) {
	b = host.AppendUint16(b, uint16(p.Type))
	b = append(b, byte(p.Dir), 0)
	b = host.AppendUint32(b, p.ID)
	b = host.AppendUint32(b, p.Priority)
	if p.Type != PolicyIPsec && len(p.Requests) > 0 {
		return b, invalid("requests in a policy of type %v", p.Type)
	}
	for _, r := range p.Requests {
		at := len(b)
		b = append(b, 0, 0)
		b = host.AppendUint16(b, r.Proto)
		b = append(b, byte(r.Mode), byte(r.Level), 0, 0)
		b = host.AppendUint32(b, r.ReqID)
		b = append(b, 0, 0, 0, 0)
		if r.Src.IsValid() || r.Dst.IsValid() {
			var err error
			if b, err = appendPair(b, netip.AddrPortFrom(r.Src, 0), netip.AddrPortFrom(r.Dst, 0)); err != nil {
				return b, err
			}
		}
		host.PutUint16(b[at:], uint16(len(b)-at))
	}
	return b, nil
}

// Check tells whether p may be the policy of SPDADD or SPDUPDATE: EINVAL, or
// ELOOP for too many requests.
func (p *Policy) Check() error {
	if p.Type > PolicyIPsec || p.Dir < DirIn || p.Dir > DirFwd {
		return &Error{Errno: einval, Ext: ExtXPolicy, What: "type or direction"}
	}
	if len(p.Requests) > maxRequests {
		return &Error{Errno: syscall.ELOOP, Ext: ExtXPolicy, What: "too many requests"}
	}
	for _, r := range p.Requests {
		if what := r.check(p.Dir); what != "" {
			return &Error{Errno: einval, Ext: ExtXPolicy, What: what}
		}
	}
	return nil
}

func (r *Request) check(d Dir) string {
	tunnel := r.Mode == ModeTunnel || r.Mode == ModeBEET
	switch {
	case r.Mode == ModeAny || r.Mode > ModeBEET:
		return "request without a mode"
	case r.Proto != protoESP && r.Proto != protoAH && r.Proto != protoIPComp:
		return "request for a protocol other than ESP, AH, IPComp"
	case r.Level > LevelUnique:
		return "request of an unknown level"
	case tunnel && !r.Src.IsValid():
		return "tunnel without end points"
	case tunnel && r.Level == LevelUse && d == DirOut:
		return "outbound tunnel of level use"
	}
	return ""
}
