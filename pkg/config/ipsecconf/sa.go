package ipsecconf

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// What SAs with manual keys are written with, here in add commands and in the
// key files of pkg/config/ipseckey. No error below has a key in it, nor a word
// that stands where one is expected.

// SAEncr reads the encryption algorithm of an SA: a name of ipsecalgs, setkey or
// the policy language, without regard to case, or its PF_KEY number. gmac is the
// one of ESP.
func SAEncr(word string) (alg.Encr, error) {
	name := strings.ToLower(word)
	if e, ok := encrs[name]; ok {
		return e, nil
	}
	switch {
	case name == "rijndael-cbc":
		return alg.EncrAESCBC, nil
	case foreignEncrs[name]:
		return 0, errors.New("not supported; " + wantSAEncr)
	}
	return 0, errors.New(wantSAEncr)
}

// SAAuth reads the integrity algorithm of an SA likewise.
func SAAuth(word string) (alg.Integ, error) {
	name := strings.TrimPrefix(strings.ToLower(word), "hmac-")
	if a, ok := auths[strings.Replace(name, "sha2-", "sha", 1)]; ok {
		return a, nil
	}
	if foreignAuths[name] {
		return 0, errors.New("not supported; " + wantSAAuth)
	}
	return 0, errors.New(wantSAAuth)
}

const (
	wantSAEncr = "want aes-cbc, aes-gcm-16, aes-gcm-12, aes-gcm-8, chacha20-poly1305, aes-ccm-16, aes-ccm-12, aes-ccm-8, aes-ctr, null-aes-gmac or null"
	wantSAAuth = "want hmac-sha1, hmac-sha256, hmac-sha384, hmac-sha512, aes-xcbc-mac, aes-cmac or, for ah, aes-gmac-128, aes-gmac-192 or aes-gmac-256"
)

// Legacy warns of what of an SA is too weak for anything but an old peer; empty
// if nothing is.
func Legacy(e alg.Encr, as ...alg.Integ) string {
	var l []string
	if e.Legacy() {
		l = append(l, e.String())
	}
	for _, a := range as {
		if a.Legacy() {
			l = append(l, a.String())
		}
	}
	if l == nil {
		return ""
	}
	return strings.Join(l, ", ") + ": legacy, weak; only for manual keys, and missiu takes it with --allow-legacy alone"
}

// HexKey reads hexadecimal digits, two for an octet. They may begin with 0x.
func HexKey(digits string) (ipsec.Key, error) {
	if rest, ok := strings.CutPrefix(digits, "0x"); ok {
		digits = rest
	} else if rest, ok := strings.CutPrefix(digits, "0X"); ok {
		digits = rest
	}
	if len(digits)%2 != 0 {
		return ipsec.Key{}, errors.New("odd number of hexadecimal digits")
	}
	b, err := hex.DecodeString(digits)
	if err != nil {
		clear(b)
		return ipsec.Key{}, errors.New("want hexadecimal digits")
	}
	return ipsec.NewKey(b), nil
}

// CheckEncrKey reports what is wrong with an encryption key: its length, salt
// included, or that DES is weak with it.
func CheckEncrKey(e alg.Encr, k ipsec.Key) error {
	i := e.Info()
	if i.KeyBits == nil {
		if k.Len() > 0 {
			return fmt.Errorf("%v has no key", e)
		}
		return nil
	}
	if n, ok := e.KeyLen((k.Len() - i.SaltLen) * 8); ok && n == k.Len() {
		return e.CheckKey(k.Bytes())
	}
	lens, bits := make([]int, len(i.KeyBits)), make([]int, len(i.KeyBits))
	for j, n := range i.KeyBits {
		lens[j] = n/8 + i.SaltLen
		bits[j] = lens[j] * 8
	}
	salt := ""
	if i.SaltLen > 0 {
		salt = fmt.Sprintf(", the last %d octets of it salt", i.SaltLen)
	}
	return fmt.Errorf("key of %d octets; %v wants %s (%s bits)%s", k.Len(), e, bitList(lens), bitList(bits), salt)
}

// CheckAuthKey reports what is wrong with the length of an integrity key.
func CheckAuthKey(a alg.Integ, k ipsec.Key) error {
	if i := a.Info(); i.KeyLen != k.Len() {
		salt := ""
		if i.SaltLen > 0 {
			salt = fmt.Sprintf(", the last %d octets of it salt", i.SaltLen)
		}
		return fmt.Errorf("key of %d octets; %v wants %d (%d bits)%s", k.Len(), a, i.KeyLen, i.KeyLen*8, salt)
	}
	return nil
}

// CheckSA reports what is wrong with an SA as a whole, apart from its keys.
// unauthenticated is the operator's word that encryption without integrity is
// meant.
func CheckSA(p *ipsec.SAParams, unauthenticated bool) error {
	old := p.Encr.Info().Old || p.Auth.Info().Old
	switch {
	case p.SPI < ipsec.MinSPI:
		return fmt.Errorf("an SPI below %d is reserved", ipsec.MinSPI)
	case old && (p.ReplayWindow != 0 || p.ESN):
		return errors.New("a replay window where packets have no sequence number")
	case p.Src.BitLen() != p.Dst.BitLen():
		return errors.New("mixed address families")
	case p.Proto == ipsec.AH && p.Encr != alg.EncrNone:
		return errors.New("AH does not encrypt")
	case p.Proto == ipsec.AH && p.Auth == alg.IntegNone:
		return errors.New("AH without an integrity algorithm")
	case p.Proto == ipsec.AH:
	case p.Encr == alg.EncrNone && p.Auth == alg.IntegNone:
		return errors.New("no algorithms")
	case p.Encr == alg.EncrNULL && p.Auth == alg.IntegNone:
		return errors.New("neither encryption nor integrity")
	case p.Encr.Info().AEAD && p.Auth != alg.IntegNone:
		return fmt.Errorf("%v has integrity of its own", p.Encr)
	case p.Auth.Info().AHOnly:
		return fmt.Errorf("%v is an algorithm of AH alone", p.Auth)
	case p.Encr.Info().Old && p.Auth != alg.IntegNone:
		return fmt.Errorf("%v has no place for integrity; AH around it has", p.Encr)
	case p.Encr.Info().Old && p.Encap != nil:
		return fmt.Errorf("%v does not go in UDP", p.Encr)
	case p.Auth == alg.IntegNone && p.Encr == alg.EncrAESCTR:
		return errors.New("aes-ctr without integrity; whoever alters a bit of the packet alters that bit of what is in it") // RFC 3686, 4
	case p.Auth == alg.IntegNone && !p.Encr.Info().AEAD && !unauthenticated:
		return errors.New("encryption without integrity; --allow-unauthenticated takes it")
	}
	return nil
}

// Unauthenticated is the warning that goes with an SA of encryption alone; empty
// for others.
func Unauthenticated(p *ipsec.SAParams) string {
	if i := p.Encr.Info(); p.Proto != ipsec.ESP || p.Auth != alg.IntegNone || i.AEAD || i.Old {
		return ""
	}
	return "encryption without authentication: whoever can alter packets can read them by and by"
}

// StaticAEAD is the warning that goes with a cipher that counts, see UsesCounter,
// under a key that stands in a file: sequence numbers, and with them nonces,
// begin anew whenever it is loaded into an empty SAD (RFC 4106, 2; RFC 3686, 4).
const StaticAEAD = "a key in a file serves again after every restart, which gives away what this cipher protects; aes-cbc with integrity does not have this weakness"

// UsesCounter reports whether an SA's nonces are its sequence numbers.
func UsesCounter(p *ipsec.SAParams) bool { return p.Encr.Info().Counter || p.Auth.Info().SaltLen > 0 }

// ManualSA is an SA of an add command.
type ManualSA struct {
	Pos lexer.Pos
	ipsec.SAParams
}

// manualReplay is the window of an add command's SA: its language has no word
// for it, and its ancestors check nothing.
const manualReplay = 0

// add reads: add src dst esp|ah spi [-m mode] [-E alg key] [-A alg key] ;
func (m *meaning) add(c *Command) {
	x := &entryMeaning{meaning: m, e: &Entry{Pos: c.Name.Pos}}
	if len(c.Args) < 4 {
		m.l.Errorf(c.Name.Pos, "add: want source, destination, esp or ah, and an SPI")
		return
	}
	sa := ManualSA{Pos: c.Name.Pos}
	sa.ReplayWindow = manualReplay
	sa.Src = x.endPoint(Param{Word{Text: "source"}, c.Args[0]})
	sa.Dst = x.endPoint(Param{Word{Text: "destination"}, c.Args[1]})
	switch w := c.Args[2]; w.Text {
	case "esp":
		sa.Proto = ipsec.ESP
	case "ah":
		sa.Proto = ipsec.AH
	default:
		x.errorf(w, "add: want esp or ah behind the addresses")
	}
	spi, ok := number(c.Args[3].Text, 1<<32-1)
	if !ok || spi < uint64(ipsec.MinSPI) {
		x.errorf(c.Args[3], "add: want an SPI from %d to 4294967295", ipsec.MinSPI)
	}
	sa.SPI = ipsec.SPI(spi)
	x.addOptions(c.Args[4:], &sa)
	if x.bad {
		sa.Wipe()
		return
	}
	if sa.Proto == ipsec.ESP && sa.Encr == alg.EncrNone && sa.Auth != alg.IntegNone {
		sa.Encr = alg.EncrNULL
	}
	if err := CheckSA(&sa.SAParams, m.opt.Unauthenticated); err != nil {
		m.l.Errorf(c.Name.Pos, "add: %v", err)
		sa.Wipe()
		return
	}
	if UsesCounter(&sa.SAParams) {
		m.l.Warnf(c.Name.Pos, "add: %s", StaticAEAD)
	}
	if w := Unauthenticated(&sa.SAParams); w != "" {
		m.l.Warnf(c.Name.Pos, "add: %s", w)
	}
	if w := Legacy(sa.Encr, sa.Auth); w != "" {
		m.l.Warnf(c.Name.Pos, "add: %s", w)
	}
	m.sas = append(m.sas, sa)
}

// addOptions reads what may come in any order.
func (m *entryMeaning) addOptions(args []Word, sa *ManualSA) {
	seen := map[string]bool{}
	for len(args) > 0 {
		opt := args[0]
		args = args[1:]
		n := map[string]int{"-m": 1, "-E": 2, "-A": 2}[opt.Text]
		switch {
		case n == 0 || opt.Quoted:
			m.errorf(opt, "add: want -m, -E or -A") // the word may be a key
			return
		case seen[opt.Text]:
			m.errorf(opt, "add: %s given twice", opt.Text)
			return
		}
		seen[opt.Text] = true
		if len(args) < n {
			// null is the one algorithm without a key.
			if opt.Text != "-E" || len(args) != 1 || !strings.EqualFold(args[0].Text, "null") {
				m.errorf(opt, "add: value missing behind %s", opt.Text)
				return
			}
			sa.Encr = alg.EncrNULL
			return
		}
		switch opt.Text {
		case "-m":
			switch args[0].Text {
			case "transport":
				sa.Mode = ipsec.Transport
			case "tunnel":
				sa.Mode = ipsec.Tunnel
			case "any":
			default:
				m.errorf(args[0], "add: want -m transport, tunnel or any")
			}
		case "-E":
			if strings.EqualFold(args[0].Text, "null") && (args[1].Text == "-A" || args[1].Text == "-m") {
				sa.Encr, n = alg.EncrNULL, 1
				break
			}
			m.addEncr(args[0], args[1], sa)
		case "-A":
			m.addAuth(args[0], args[1], sa)
		}
		args = args[n:]
	}
}

func (m *entryMeaning) addEncr(name, key Word, sa *ManualSA) {
	k, err := addKey(key)
	if err != nil {
		m.errorf(key, "add: encryption key: %v", err)
		return
	}
	sa.EncrKey = k
	if sa.Encr, err = SAEncr(name.Text); err != nil {
		m.errorf(name, "add: encryption algorithm: %v", err)
		return
	}
	if err := CheckEncrKey(sa.Encr, k); err != nil {
		m.errorf(key, "add: encryption key: %v", err)
	}
}

func (m *entryMeaning) addAuth(name, key Word, sa *ManualSA) {
	k, err := addKey(key)
	if err != nil {
		m.errorf(key, "add: integrity key: %v", err)
		return
	}
	sa.AuthKey = k
	if sa.Auth, err = SAAuth(name.Text); err != nil {
		m.errorf(name, "add: integrity algorithm: %v", err)
		return
	}
	if err := CheckAuthKey(sa.Auth, k); err != nil {
		m.errorf(key, "add: integrity key: %v", err)
	}
}

// addKey: 0x and digits, or a string of which each octet counts.
func addKey(w Word) (ipsec.Key, error) {
	if w.Quoted {
		return ipsec.NewKey([]byte(w.Text)), nil
	}
	if !strings.HasPrefix(w.Text, "0x") && !strings.HasPrefix(w.Text, "0X") {
		return ipsec.Key{}, errors.New("want 0x and hexadecimal digits, or a string in quotes")
	}
	return HexKey(w.Text)
}

// modes settles the mode of SAs for which none was given: tunnel where the text
// has a tunnel between their addresses, else transport.
func modes(sas []ManualSA, rules []Rule) {
	type ends struct{ src, dst string }
	tunnels := map[ends]bool{}
	for i := range rules {
		for _, r := range rules[i].Policy.Requests {
			if r.Mode == ipsec.Tunnel {
				tunnels[ends{r.Src.String(), r.Dst.String()}] = true
			}
		}
	}
	for i := range sas {
		if s := &sas[i]; s.Mode == ipsec.ModeAny {
			s.Mode = ipsec.Transport
			if tunnels[ends{s.Src.String(), s.Dst.String()}] {
				s.Mode = ipsec.Tunnel
			}
		}
	}
}
