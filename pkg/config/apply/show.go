package apply

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Listing is how policies are shown.
type Listing struct {
	Apart   bool // what goes out before what comes in
	Numeric bool // no names of protocols
}

func rank(d ipsec.Direction) int {
	switch d {
	case ipsec.Out:
		return 0
	case ipsec.In:
		return 1
	}
	return 2
}

// inOrder sorts policies as they are tried.
func inOrder(ps []*keysock.PolicyInfo, apart bool) []*keysock.PolicyInfo {
	ps = slices.Clone(ps)
	slices.SortStableFunc(ps, func(a, b *keysock.PolicyInfo) int {
		byDir, byPrio := cmp.Compare(rank(a.Dir), rank(b.Dir)), cmp.Compare(a.Priority, b.Priority)
		if apart {
			return cmp.Or(byDir, byPrio)
		}
		return cmp.Or(byPrio, byDir)
	})
	return ps
}

// supply is the SAs that policies could use.
type supply struct {
	byReqID map[ipsec.ReqID]int
	manual  []*keysock.SAInfo
}

func newSupply(sas []*keysock.SAInfo) *supply {
	s := &supply{byReqID: map[ipsec.ReqID]int{}}
	for _, i := range sas {
		switch {
		case i.State != keysock.Mature && i.State != keysock.Dying:
		case i.ReqID == 0:
			s.manual = append(s.manual, i)
		default:
			s.byReqID[i.ReqID]++
		}
	}
	return s
}

// count is how many SAs serve a policy that protects, in both directions where
// they have a reqid.
func (s *supply) count(p *ipsec.Policy) int {
	n := 0
	for _, r := range p.Requests {
		if r.ReqID != 0 {
			n += s.byReqID[r.ReqID]
		}
		if r.ReqID != 0 && p.Flags&ipsec.PolicyManual == 0 {
			continue
		}
		for _, i := range s.manual {
			switch {
			case i.Proto != r.Proto || i.Mode != r.Mode:
			case r.Mode == ipsec.Tunnel && !r.Ends(i.Src, i.Dst), r.Template() && len(i.DstTS) == 0:
			case r.Mode != ipsec.Tunnel && (!p.Sel.Src.Contains(i.Src) || !p.Sel.Dst.Contains(i.Dst)):
			default:
				n++
			}
		}
	}
	return n
}

// up says whether a policy that protects has an SA.
func (s *supply) up(p *ipsec.Policy) string {
	switch n := s.count(p); {
	case p.Action != ipsec.Protect:
		return ""
	case n == 0:
		return ", configured and not up"
	case n == 1:
		return ", 1 SA"
	default:
		return fmt.Sprintf(", %d SAs", n)
	}
}

// WritePolicies shows policies in the order in which they are tried, as entries
// of the policy language with a comment above each, which says how many packets
// they decided about and, of those that protect, whether there is an SA among
// sas. Policies that the language cannot say, those for forwarded packets among
// them, and those of other programs are comments as a whole, so the text can be
// loaded again.
func WritePolicies(w io.Writer, ps []*keysock.PolicyInfo, sas []*keysock.SAInfo, how Listing) error {
	have := newSupply(sas)
	b := bufio.NewWriter(w)
	for _, i := range inOrder(ps, how.Apart) {
		if managed(&i.Policy) {
			fmt.Fprintf(b, "#INDEX %d\n", entryNumber(&i.Policy))
		}
		fmt.Fprintf(b, "# id %d %v priority %d", i.ID, i.Dir, i.Priority)
		for _, r := range i.Requests {
			fmt.Fprintf(b, " %v %v reqid %d", r.Proto, r.Mode, r.ReqID)
		}
		fmt.Fprintf(b, ", packets %d", i.Packets)
		writeTimes(b, i.Added, "last used", i.LastUsed)
		b.WriteString(have.up(&i.Policy))
		entry, note := ipsecconf.FormatNumeric(&i.Policy, how.Numeric)
		if !managed(&i.Policy) {
			note = strings.TrimSuffix("of another program; "+note, "; ")
		}
		if note != "" {
			fmt.Fprintf(b, "\n# %s:\n# %s\n", note, entry)
		} else {
			fmt.Fprintf(b, "\n%s\n", entry)
		}
	}
	return b.Flush()
}

// writeTimes tells when something was added and, in the words of what, used.
func writeTimes(w io.Writer, added time.Time, what string, used time.Time) {
	if !added.IsZero() {
		fmt.Fprintf(w, ", added %s", added.UTC().Format(time.RFC3339))
	}
	if used.IsZero() {
		fmt.Fprint(w, ", never used")
	} else {
		fmt.Fprintf(w, ", %s %s", what, used.UTC().Format(time.RFC3339))
	}
}

// WriteSAs shows SAs, never their keys.
func WriteSAs(w io.Writer, sas []*keysock.SAInfo) error {
	b := bufio.NewWriter(w)
	for _, i := range sas {
		fmt.Fprintf(b, "%v %v -> %v spi %v %v reqid %d %s\n", i.Proto, i.Src, i.Dst, i.SPI, i.Mode, i.ReqID, stateName(i.State))
		if i.State == keysock.Larval {
			continue
		}
		fmt.Fprintf(b, "    %s, replay window %d, extended sequence numbers %s", algorithms(&i.SAParams), i.ReplayWindow, map[bool]string{true: "yes", false: "no"}[i.ESN])
		if i.AggFrag {
			fmt.Fprint(b, ", AGGFRAG")
		}
		if i.CPI != 0 {
			fmt.Fprintf(b, ", IPComp with CPI %d", i.CPI)
		}
		switch i.TFC {
		case 0:
		case ipsec.TFCPathMTU:
			fmt.Fprint(b, ", padded to the path MTU")
		default:
			fmt.Fprintf(b, ", padded to %d octets", i.TFC)
		}
		switch {
		case i.Queue != 0:
			fmt.Fprintf(b, ", queue %d", i.Queue)
		case i.PerQueue:
			fmt.Fprint(b, ", any queue")
		}
		if e := i.Encap; e != nil {
			fmt.Fprintf(b, ", in UDP %d -> %d", e.SPort, e.DPort)
		}
		fmt.Fprintf(b, "\n    packets %d, bytes %d", i.Packets, i.Bytes)
		writeTimes(b, i.Added, "first used", i.FirstUsed)
		if s := lifetime(i.Hard); s != "" {
			fmt.Fprintf(b, "\n    hard limit %s", s)
		}
		if s := lifetime(i.Soft); s != "" {
			fmt.Fprintf(b, "\n    soft limit %s", s)
		}
		if s := idle(i.Idle); s != "" {
			fmt.Fprintf(b, "\n    idle limit %s", s)
		}
		if len(i.SrcTS) > 0 || len(i.DstTS) > 0 {
			fmt.Fprintf(b, "\n    selectors %s -> %s", selectors(i.SrcTS), selectors(i.DstTS))
		}
		b.WriteByte('\n')
	}
	return b.Flush()
}

func stateName(s keysock.State) string {
	switch s {
	case keysock.Larval:
		return "larval"
	case keysock.Mature:
		return "mature"
	case keysock.Dying:
		return "dying"
	case keysock.Dead:
		return "dead"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// algorithms names them with the size of the cipher key, without salt.
func algorithms(p *ipsec.SAParams) string {
	s := p.Encr.String()
	if n := p.EncrKey.Len() - p.Encr.Info().SaltLen; n > 0 {
		s += fmt.Sprintf("(%d)", n*8)
	}
	if !p.Encr.Info().AEAD {
		s += " " + p.Auth.String()
	}
	return s
}

func lifetime(l ipsec.Lifetime) string {
	var s []string
	if l.AddTime != 0 {
		s = append(s, fmt.Sprintf("%d s", l.AddTime/time.Second))
	}
	if l.UseTime != 0 {
		s = append(s, fmt.Sprintf("%d s of use", l.UseTime/time.Second))
	}
	if l.Bytes != 0 {
		s = append(s, fmt.Sprintf("%d bytes", l.Bytes))
	}
	if l.Packets != 0 {
		s = append(s, fmt.Sprintf("%d packets", l.Packets))
	}
	return strings.Join(s, ", ")
}

func idle(l ipsec.Idle) string {
	var s []string
	if l.AddTime != 0 {
		s = append(s, fmt.Sprintf("%d s unused", l.AddTime/time.Second))
	}
	if l.UseTime != 0 {
		s = append(s, fmt.Sprintf("%d s behind the last use", l.UseTime/time.Second))
	}
	return strings.Join(s, ", ")
}

func selectors(l []ipsec.TrafficSelector) string {
	if len(l) == 0 {
		return "any"
	}
	var s []string
	for _, t := range l {
		s = append(s, t.String())
	}
	return strings.Join(s, " ")
}
