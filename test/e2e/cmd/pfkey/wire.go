package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
)

// Numbers of RFC 2367 and of Linux's linux/pfkeyv2.h.
const (
	add      = 3
	register = 7
	dump     = 10
	spdadd   = 14

	satypeESP = 3

	extSA       = 1
	extSrc      = 5
	extDst      = 6
	extKeyAuth  = 8
	extKeyEncr  = 9
	extPolicy   = 18
	extSA2      = 19
	extNATType  = 20
	extNATSport = 21
	extNATDport = 22
)

var (
	encrNames = map[uint8]string{0: "", 3: "3des-cbc", 11: "null", 12: "aes-cbc", 18: "aes-gcm8", 19: "aes-gcm12", 20: "aes-gcm16", 28: "chacha20poly1305", 30: "aes-gcm16-iiv"}
	authNames = map[uint8]string{0: "", 3: "sha1", 5: "sha256", 6: "sha384", 7: "sha512"}
	stateName = [4]string{"larval", "mature", "dying", "dead"}
	modeNames = map[uint8]string{0: "any", 1: "transport", 2: "tunnel"}
)

// SA is an ESP SA with its keys in hex.
type SA struct {
	SPI     uint32     `json:"spi"`
	Src     netip.Addr `json:"src"`
	Dst     netip.Addr `json:"dst"`
	Mode    string     `json:"mode"`
	ReqID   uint32     `json:"reqid"`
	State   string     `json:"state,omitempty"`
	Replay  uint8      `json:"replay"`
	Encr    string     `json:"encr"`
	EncrKey string     `json:"encr_key"`
	Auth    string     `json:"auth"`
	AuthKey string     `json:"auth_key"`
	Sport   uint16     `json:"sport,omitempty"` // of UDP encapsulation
	Dport   uint16     `json:"dport,omitempty"`
}

// Policy is an SPD entry with one ESP request at level require.
type Policy struct {
	Dir   string       `json:"dir"` // in, out
	Src   netip.Prefix `json:"src"`
	Dst   netip.Prefix `json:"dst"`
	Proto uint8        `json:"proto"` // 0 any
	Mode  string       `json:"mode"`
	TSrc  netip.Addr   `json:"tun_src"`
	TDst  netip.Addr   `json:"tun_dst"`
	ReqID uint32       `json:"reqid"`
}

type message struct {
	typ, errno uint8
	seq, pid   uint32
	ext        map[uint16][]byte
}

var le = binary.NativeEndian

func header(typ, satype uint8, seq uint32) []byte {
	b := make([]byte, 16)
	b[0], b[1], b[3] = 2, typ, satype
	le.PutUint16(b[4:], 2)
	le.PutUint32(b[8:], seq)
	le.PutUint32(b[12:], uint32(os.Getpid()))
	return b
}

// extend appends an extension, padded to words, and corrects the message's length.
func extend(b []byte, typ uint16, body []byte) []byte {
	for len(body)%8 != 4 {
		body = append(body, 0)
	}
	b = le.AppendUint16(b, uint16((len(body)+4)/8))
	b = le.AppendUint16(b, typ)
	b = append(b, body...)
	le.PutUint16(b[4:], uint16(len(b)/8))
	return b
}

func parse(b []byte) (*message, error) {
	if len(b) < 16 || b[0] != 2 || int(le.Uint16(b[4:]))*8 != len(b) {
		return nil, fmt.Errorf("not a PF_KEY message: %x", b[:min(16, len(b))])
	}
	m := &message{typ: b[1], errno: b[2], seq: le.Uint32(b[8:]), pid: le.Uint32(b[12:]), ext: map[uint16][]byte{}}
	for b = b[16:]; len(b) > 0; {
		if len(b) < 8 {
			return nil, errors.New("extension cut")
		}
		n := int(le.Uint16(b)) * 8
		if n < 8 || n > len(b) {
			return nil, fmt.Errorf("extension of %d octets", n)
		}
		m.ext[le.Uint16(b[2:])] = b[4:n]
		b = b[n:]
	}
	return m, nil
}

func sockaddr(a netip.Addr, port uint16) []byte {
	if a.Is4() {
		b := make([]byte, 16)
		le.PutUint16(b, 2)
		binary.BigEndian.PutUint16(b[2:], port)
		copy(b[4:], a.AsSlice())
		return b
	}
	b := make([]byte, 28)
	le.PutUint16(b, 10)
	binary.BigEndian.PutUint16(b[2:], port)
	copy(b[8:], a.AsSlice())
	return b
}

func address(a netip.Addr, bits int, proto uint8) []byte {
	return append([]byte{proto, uint8(bits), 0, 0}, sockaddr(a, 0)...)
}

func addressOf(b []byte) (netip.Addr, error) {
	if len(b) >= 20 && le.Uint16(b[4:]) == 2 {
		return netip.AddrFrom4([4]byte(b[8:12])), nil
	}
	if len(b) >= 32 && le.Uint16(b[4:]) == 10 {
		return netip.AddrFrom16([16]byte(b[12:28])), nil
	}
	return netip.Addr{}, fmt.Errorf("address %x", b)
}

func number(names map[uint8]string, name string) uint8 {
	for k, v := range names {
		if v == name {
			return k
		}
	}
	return 255 // nothing has it; missiu must refuse
}

func key(b []byte, typ uint16, hexKey string) []byte {
	k, err := hex.DecodeString(hexKey)
	if err != nil || len(k) == 0 {
		return b
	}
	body := le.AppendUint16(nil, uint16(len(k)*8))
	return extend(b, typ, append(append(body, 0, 0), k...))
}

func (a *SA) message(seq uint32) []byte {
	b := header(add, satypeESP, seq)
	sa := binary.BigEndian.AppendUint32(nil, a.SPI)
	sa = append(sa, a.Replay, 1, number(authNames, a.Auth), number(encrNames, a.Encr), 0, 0, 0, 0)
	b = extend(b, extSA, sa)
	b = extend(b, extSrc, address(a.Src, a.Src.BitLen(), 0))
	b = extend(b, extDst, address(a.Dst, a.Dst.BitLen(), 0))
	if a.Encr == "null" {
		b = extend(b, extKeyEncr, make([]byte, 4))
	}
	b = key(b, extKeyEncr, a.EncrKey)
	b = key(b, extKeyAuth, a.AuthKey)
	sa2 := make([]byte, 12)
	sa2[0] = number(modeNames, a.Mode)
	le.PutUint32(sa2[8:], a.ReqID)
	b = extend(b, extSA2, sa2)
	if a.Sport != 0 {
		b = extend(b, extNATType, []byte{2, 0, 0, 0})
		b = extend(b, extNATSport, binary.BigEndian.AppendUint16(nil, a.Sport))
		b = extend(b, extNATDport, binary.BigEndian.AppendUint16(nil, a.Dport))
	}
	return b
}

func (m *message) sa() (*SA, error) {
	x := m.ext[extSA]
	if len(x) < 12 {
		return nil, errors.New("SA extension cut")
	}
	a := &SA{SPI: binary.BigEndian.Uint32(x), Replay: x[4], Auth: authNames[x[6]], Encr: encrNames[x[7]]}
	if int(x[5]) < len(stateName) {
		a.State = stateName[x[5]]
	}
	var err error
	if a.Src, err = addressOf(m.ext[extSrc]); err != nil {
		return nil, err
	}
	if a.Dst, err = addressOf(m.ext[extDst]); err != nil {
		return nil, err
	}
	for typ, to := range map[uint16]*string{extKeyEncr: &a.EncrKey, extKeyAuth: &a.AuthKey} {
		if k := m.ext[typ]; len(k) >= 4 {
			n := int(le.Uint16(k)) / 8
			if len(k) < 4+n {
				return nil, errors.New("key extension cut")
			}
			*to = hex.EncodeToString(k[4 : 4+n])
		}
	}
	if s := m.ext[extSA2]; len(s) >= 12 {
		a.Mode, a.ReqID = modeNames[s[0]], le.Uint32(s[8:])
	}
	if t := m.ext[extNATType]; len(t) >= 1 && t[0] == 2 {
		if p := m.ext[extNATSport]; len(p) >= 2 {
			a.Sport = binary.BigEndian.Uint16(p)
		}
		if p := m.ext[extNATDport]; len(p) >= 2 {
			a.Dport = binary.BigEndian.Uint16(p)
		}
	}
	return a, nil
}

func (p *Policy) message(seq uint32) []byte {
	proto := p.Proto
	if proto == 0 {
		proto = 255
	}
	dir := uint8(1)
	if p.Dir == "out" {
		dir = 2
	}
	b := header(spdadd, 0, seq)
	b = extend(b, extSrc, address(p.Src.Addr(), p.Src.Bits(), proto))
	b = extend(b, extDst, address(p.Dst.Addr(), p.Dst.Bits(), proto))
	pol := make([]byte, 12)
	le.PutUint16(pol, 2)
	pol[2] = dir
	le.PutUint32(pol[8:], 1<<31)
	req := make([]byte, 16)
	le.PutUint16(req[2:], 50)
	req[4], req[5] = number(modeNames, p.Mode), 2
	le.PutUint32(req[8:], p.ReqID)
	if p.Mode == "tunnel" {
		req = append(req, sockaddr(p.TSrc, 0)...)
		req = append(req, sockaddr(p.TDst, 0)...)
	}
	le.PutUint16(req, uint16(len(req)))
	return extend(b, extPolicy, append(pol, req...))
}
