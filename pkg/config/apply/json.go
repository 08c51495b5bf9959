package apply

import (
	"encoding/json"
	"io"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// jsonPolicy is a policy for other programs. Fields are only ever added.
type jsonPolicy struct {
	ID        uint32     `json:"id"`
	Index     int        `json:"index,omitempty"` // of the entry, 0: of another program
	Direction string     `json:"direction"`
	Action    string     `json:"action"`
	Priority  uint32     `json:"priority"`
	Entry     string     `json:"entry"`
	Note      string     `json:"note,omitempty"` // what the entry does not say
	Packets   uint64     `json:"packets"`
	Added     *time.Time `json:"added,omitempty"`
	LastUsed  *time.Time `json:"last_used,omitempty"`
	ReqIDs    []uint32   `json:"reqids,omitempty"`
	SAs       *int       `json:"sas,omitempty"` // of policies that protect
}

type jsonSA struct {
	Protocol  string       `json:"protocol"`
	SPI       uint32       `json:"spi"`
	Src       string       `json:"src"`
	Dst       string       `json:"dst"`
	Mode      string       `json:"mode"`
	ReqID     uint32       `json:"reqid"`
	State     string       `json:"state"`
	Encr      string       `json:"encr,omitempty"`
	EncrBits  int          `json:"encr_bits,omitempty"` // without salt
	Auth      string       `json:"auth,omitempty"`
	Replay    uint32       `json:"replay_window"`
	ESN       bool         `json:"esn"`
	AggFrag   bool         `json:"aggfrag"`
	CPI       uint16       `json:"cpi,omitempty"`       // payloads are compressed by IPComp with this CPI, as far as that makes them shorter
	TFC       uint16       `json:"tfc,omitempty"`       // octets that packets are padded to, 65535: the path MTU
	Queue     uint16       `json:"queue,omitempty"`     // the only one that it is for
	PerQueue  bool         `json:"per_queue,omitempty"` // there may be others for single queues
	UDP       *[2]uint16   `json:"udp,omitempty"`       // source and destination port
	Packets   uint64       `json:"packets"`
	Bytes     uint64       `json:"bytes"`
	Added     *time.Time   `json:"added,omitempty"`
	FirstUsed *time.Time   `json:"first_used,omitempty"`
	Hard      *jsonLimits  `json:"hard,omitempty"`
	Soft      *jsonLimits  `json:"soft,omitempty"`
	Idle      *jsonLimits  `json:"idle,omitempty"`
	LastSeq   uint64       `json:"last_sequence,omitempty"`
	Selectors *[2][]string `json:"selectors,omitempty"` // source and destination
}

type jsonLimits struct {
	Seconds    int64  `json:"seconds,omitempty"`
	UseSeconds int64  `json:"use_seconds,omitempty"`
	Bytes      uint64 `json:"bytes,omitempty"`
	Packets    uint64 `json:"packets,omitempty"`
}

func jsonTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func limitsJSON(l ipsec.Lifetime) *jsonLimits {
	if l.IsZero() {
		return nil
	}
	return &jsonLimits{int64(l.AddTime / time.Second), int64(l.UseTime / time.Second), l.Bytes, l.Packets}
}

// writeLines writes an array with an element on each line.
func writeLines[T any](w io.Writer, n int, of func(i int) T) error {
	for i := range n {
		b, err := json.Marshal(of(i))
		if err != nil {
			return err
		}
		lead := ",\n"
		if i == 0 {
			lead = "["
		}
		if _, err := w.Write(append([]byte(lead), b...)); err != nil {
			return err
		}
	}
	end := "]\n"
	if n == 0 {
		end = "[]\n"
	}
	_, err := io.WriteString(w, end)
	return err
}

// WritePoliciesJSON shows policies as WritePolicies does, as an array of objects.
func WritePoliciesJSON(w io.Writer, ps []*keysock.PolicyInfo, sas []*keysock.SAInfo) error {
	have, ps := newSupply(sas), inOrder(ps, false)
	return writeLines(w, len(ps), func(k int) jsonPolicy {
		i := ps[k]
		j := jsonPolicy{
			ID: i.ID, Direction: i.Dir.String(), Action: i.Action.String(), Priority: i.Priority,
			Packets: i.Packets, Added: jsonTime(i.Added), LastUsed: jsonTime(i.LastUsed),
		}
		if managed(&i.Policy) {
			j.Index = entryNumber(&i.Policy)
		}
		j.Entry, j.Note = ipsecconf.Format(&i.Policy)
		for _, r := range i.Requests {
			j.ReqIDs = append(j.ReqIDs, uint32(r.ReqID))
		}
		if i.Action == ipsec.Protect {
			n := have.count(&i.Policy)
			j.SAs = &n
		}
		return j
	})
}

// WriteSAsJSON shows SAs, never their keys, as an array of objects.
func WriteSAsJSON(w io.Writer, sas []*keysock.SAInfo) error {
	return writeLines(w, len(sas), func(k int) jsonSA {
		i := sas[k]
		j := jsonSA{
			Protocol: i.Proto.String(), SPI: uint32(i.SPI), Src: i.Src.String(), Dst: i.Dst.String(), Mode: i.Mode.String(),
			ReqID: uint32(i.ReqID), State: stateName(i.State), Replay: i.ReplayWindow, ESN: i.ESN, AggFrag: i.AggFrag, TFC: i.TFC, CPI: i.CPI, Queue: uint16(i.Queue), PerQueue: i.PerQueue,
			Packets: i.Packets, Bytes: i.Bytes, Added: jsonTime(i.Added), FirstUsed: jsonTime(i.FirstUsed),
			Hard: limitsJSON(i.Hard), Soft: limitsJSON(i.Soft), Idle: limitsJSON(ipsec.Lifetime{AddTime: i.Idle.AddTime, UseTime: i.Idle.UseTime}), LastSeq: i.LastSeq,
		}
		if i.State != keysock.Larval {
			j.Encr, j.Auth = i.Encr.String(), i.Auth.String()
			j.EncrBits = max(0, i.EncrKey.Len()-i.Encr.Info().SaltLen) * 8
		}
		if e := i.Encap; e != nil {
			j.UDP = &[2]uint16{e.SPort, e.DPort}
		}
		if len(i.SrcTS) > 0 || len(i.DstTS) > 0 {
			j.Selectors = &[2][]string{texts(i.SrcTS), texts(i.DstTS)}
		}
		return j
	})
}

func texts(l []ipsec.TrafficSelector) []string {
	s := make([]string, len(l))
	for i, t := range l {
		s[i] = t.String()
	}
	return s
}
