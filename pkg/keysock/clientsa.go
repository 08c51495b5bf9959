package keysock

import (
	"context"
	"errors"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// Register makes this client hear Acquire, Expire and NewMapping; for which
// protocols (none: ESP and AH) makes no difference to what it hears, as on Linux.
// It may be called again. The result tells what the engine has.
func (c *Client) Register(ctx context.Context, protos ...ipsec.Protocol) (Supported, error) {
	if len(protos) == 0 {
		protos = allProtocols
	}
	for _, p := range protos {
		t, err := saTypeOf(p)
		if err != nil {
			return Supported{}, err
		}
		if _, err := c.register(ctx, t); err != nil && !errors.Is(err, syscall.EEXIST) {
			return Supported{}, err
		}
	}
	return c.register(ctx, pfkey.SATypeUnspec)
}

func (c *Client) register(ctx context.Context, t pfkey.SAType) (s Supported, err error) {
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.Register, SAType: t}, OptIn: &pfkey.OptIn{Features: pfkey.FeaturePrivate | pfkey.FeaturePacks}}
	err = c.do(ctx, m, func(a *pfkey.Message) error {
		s = supportedFromWire(a.SupportedAuth, a.SupportedEncr)
		if a.Queue != nil {
			s.Queues = ipsec.Queue(a.Queue.N)
		}
		if a.OptIn != nil && a.OptIn.Features&pfkey.FeaturePacks != 0 {
			c.packs.Store(true)
		}
		return nil
	})
	return s, err
}

// GetSPI makes a larval SA and returns its SPI. EEXIST: none is free.
func (c *Client) GetSPI(ctx context.Context, g GetSPI) (spi ipsec.SPI, err error) {
	i := SAInfo{SAParams: ipsec.SAParams{
		SAID: ipsec.SAID{Proto: g.Proto, Dst: g.Dst}, Src: g.Src, Mode: g.Mode, ReqID: g.ReqID, Encap: g.Encap,
	}}
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.GetSPI, Seq: g.Seq}}
	if err := putSA(m, &i, 0); err != nil {
		return 0, err
	}
	m.SA = nil
	if g.Queue != 0 {
		m.Queue = &pfkey.Queue{N: uint16(g.Queue)}
	}
	if g.Min != 0 || g.Max != 0 {
		m.SPIRange = &pfkey.SPIRange{Min: uint32(g.Min), Max: uint32(g.Max)}
	}
	err = c.do(ctx, m, func(a *pfkey.Message) error {
		if a.SA == nil {
			return refuse(syscall.EBADMSG, "GETSPI answer without an SA")
		}
		spi = ipsec.SPI(a.SA.SPI)
		return nil
	})
	return spi, err
}

// Add makes an SA; seq is that of the Acquire it answers, else 0. The keys of p
// stay the caller's. EEXIST: it exists, perhaps larval.
func (c *Client) Add(ctx context.Context, p *ipsec.SAParams, seq uint32) error {
	return c.putParams(ctx, pfkey.Add, p, seq)
}

// Update completes a larval SA, or gives a mature one new lifetimes and NAT-T
// ports. ESRCH: it is not there.
func (c *Client) Update(ctx context.Context, p *ipsec.SAParams, seq uint32) error {
	return c.putParams(ctx, pfkey.Update, p, seq)
}

// Move gives the mature SA id the addresses and ports of p, which is otherwise the
// same SA. ESRCH: it is not there; EEXIST: another one has the place.
func (c *Client) Move(ctx context.Context, id ipsec.SAID, p *ipsec.SAParams) error {
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.Update}}
	if err := putSA(m, &SAInfo{SAParams: *p, State: Mature}, withKeys|withPrivate); err != nil {
		return err
	}
	if !id.Dst.IsValid() {
		return refuse(syscall.EINVAL, "no destination")
	}
	m.SADst = hostAddr(id.Dst)
	return c.do(ctx, m, nil)
}

func (c *Client) putParams(ctx context.Context, t pfkey.MsgType, p *ipsec.SAParams, seq uint32) error {
	m := &pfkey.Message{Header: pfkey.Header{Type: t, Seq: seq}}
	if err := putSA(m, &SAInfo{SAParams: *p, State: Mature, Seq: seq}, withKeys|withPrivate); err != nil {
		return err
	}
	return c.do(ctx, m, nil)
}

// Delete removes an SA. src takes no part in finding it; if it is invalid, one
// is made up. ESRCH: it is not there.
func (c *Client) Delete(ctx context.Context, id ipsec.SAID, src netip.Addr) error {
	m, err := idMessage(pfkey.Delete, id, src)
	if err != nil {
		return err
	}
	return c.do(ctx, m, nil)
}

// Get returns an SA with its keys, which the caller wipes. ESRCH: it is not there.
func (c *Client) Get(ctx context.Context, id ipsec.SAID, src netip.Addr) (*SAInfo, error) {
	m, err := idMessage(pfkey.Get, id, src)
	if err != nil {
		return nil, err
	}
	var i *SAInfo
	err = c.do(ctx, m, func(a *pfkey.Message) (err error) {
		i, err = takeSA(a)
		return err
	})
	if err != nil {
		if i != nil {
			i.Wipe()
		}
		return nil, err
	}
	return i, nil
}

func idMessage(t pfkey.MsgType, id ipsec.SAID, src netip.Addr) (*pfkey.Message, error) {
	m := &pfkey.Message{Header: pfkey.Header{Type: t}, SA: &pfkey.SA{SPI: uint32(id.SPI)}}
	if !src.IsValid() {
		src = netip.IPv6Unspecified()
		if id.Dst.Is4() {
			src = netip.IPv4Unspecified()
		}
	}
	putAddrs(m, src, id.Dst)
	var err error
	m.SAType, err = saTypeOf(id.Proto)
	return m, err
}

// Flush removes every SA of a protocol; 0 is all protocols.
func (c *Client) Flush(ctx context.Context, proto ipsec.Protocol) error {
	t, err := saTypeOf(proto)
	if err != nil {
		return err
	}
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.Flush, SAType: t}}, nil)
}

// Dump returns the SAs of a protocol (0: all), larval ones too, with their keys,
// which the caller wipes. EBUSY: another dump on this client is unfinished.
func (c *Client) Dump(ctx context.Context, proto ipsec.Protocol) ([]*SAInfo, error) {
	t, err := saTypeOf(proto)
	if err != nil {
		return nil, err
	}
	var l []*SAInfo
	err = c.doDump(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, SAType: t}},
		func(a *pfkey.Message) error {
			i, err := takeSA(a)
			if err == nil {
				l = append(l, i)
			}
			return err
		})
	if err != nil {
		for _, i := range l {
			i.Wipe()
		}
		return nil, err
	}
	return l, nil
}

// AcquireFailed reports that an Acquire cannot be answered, typically with
// ETIMEDOUT. The server does not answer.
func (c *Client) AcquireFailed(ctx context.Context, seq uint32, errno syscall.Errno) error {
	h := pfkey.Header{
		Type: pfkey.Acquire, SAType: pfkey.SATypeESP, Errno: errnoOf(errno), Seq: seq, Pid: c.pid,
	}
	return c.send(ctx, h.Append(nil))
}
