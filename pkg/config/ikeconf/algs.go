package ikeconf

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/proposal"
)

// algorithm is one algorithm as written, with what it means.
type algorithm struct {
	pos    Pos
	text   string // as written
	name   string // folded, without suffix and key length
	lo, hi int    // bits; 0: as the cipher has
	ke     alg.KE // of groups; also those without implementation
	none   bool   // additional_ke none, childsa_pfs 0
	same   bool   // childsa_pfs ike
}

// known algorithms by folded name. A zero value of encr, integ, prf means that
// we know the name, and what is to be said of it, but cannot compute it.
type cipherInfo struct {
	encr   alg.Encr
	bits   []int // key lengths that may be written
	aead   bool
	weak   bool
	legacy bool
}

var aesBits = []int{128, 192, 256}

var cipherTable = map[string]cipherInfo{
	"aes":               {encr: alg.EncrAESCBC, bits: aesBits},
	"aes-ctr":           {encr: alg.EncrAESCTR, bits: aesBits},
	"3des":              {encr: alg.Encr3DESCBC, bits: []int{192}, legacy: true},
	"des":               {bits: []int{64}, weak: true},
	"blowfish":          {bits: []int{128, 192, 256, 448}, weak: true},
	"aes-gcm-8":         {encr: alg.EncrAESGCM8, bits: aesBits, aead: true},
	"aes-gcm-12":        {encr: alg.EncrAESGCM12, bits: aesBits, aead: true},
	"aes-gcm-16":        {encr: alg.EncrAESGCM16, bits: aesBits, aead: true},
	"aes-ccm-8":         {encr: alg.EncrAESCCM8, bits: aesBits, aead: true},
	"aes-ccm-12":        {encr: alg.EncrAESCCM12, bits: aesBits, aead: true},
	"aes-ccm-16":        {encr: alg.EncrAESCCM16, bits: aesBits, aead: true},
	"chacha20-poly1305": {encr: alg.EncrChaCha20Poly1305, bits: []int{256}, aead: true},
}

var cipherAliases = map[string]string{
	"aes-cbc": "aes", "ctr": "aes-ctr", "3des-cbc": "3des", "des-cbc": "des", "blowfish-cbc": "blowfish", "blowfish-cdc": "blowfish",
	"gcm": "aes-gcm-16", "aes-gcm": "aes-gcm-16", "ccm": "aes-ccm-16", "aes-ccm": "aes-ccm-16",
	"gcm-8": "aes-gcm-8", "gcm-12": "aes-gcm-12", "gcm-16": "aes-gcm-16",
	"ccm-8": "aes-ccm-8", "ccm-12": "aes-ccm-12", "ccm-16": "aes-ccm-16",
}

type hashInfo struct {
	integ  alg.Integ
	prf    alg.PRF
	weak   bool
	legacy bool
}

var hashTable = map[string]hashInfo{
	"md5":      {weak: true},
	"sha1":     {integ: alg.IntegHMACSHA1, prf: alg.PRFHMACSHA1, legacy: true},
	"sha256":   {integ: alg.IntegHMACSHA256, prf: alg.PRFHMACSHA256},
	"sha384":   {integ: alg.IntegHMACSHA384, prf: alg.PRFHMACSHA384},
	"sha512":   {integ: alg.IntegHMACSHA512, prf: alg.PRFHMACSHA512},
	"aes-xcbc": {integ: alg.IntegAESXCBC, prf: alg.PRFAESXCBC},
	"aes-cmac": {integ: alg.IntegAESCMAC, prf: alg.PRFAESCMAC},
}

// groupNames are the key exchange methods by number of the IKEv2 registry.
var groupNames = map[alg.KE][]string{
	1: {"modp768"}, 2: {"modp1024"}, 5: {"modp1536"},
	14: {"modp2048"}, 15: {"modp3072"}, 16: {"modp4096"}, 17: {"modp6144"}, 18: {"modp8192"},
	19: {"ecp256"}, 20: {"ecp384"}, 21: {"ecp521"},
	22: {"modp1024s160"}, 23: {"modp2048s224"}, 24: {"modp2048s256"},
	25: {"ecp192"}, 26: {"ecp224"},
	27: {"brainpoolp224r1"}, 28: {"brainpoolp256r1"}, 29: {"brainpoolp384r1"}, 30: {"brainpoolp512r1"},
	31: {"x25519", "curve25519"}, 32: {"x448", "curve448"},
	35: {"ml-kem-512"}, 36: {"ml-kem-768"}, 37: {"ml-kem-1024"},
}

var groupByName = func() map[string]alg.KE {
	m := map[string]alg.KE{}
	for n, names := range groupNames {
		m[strconv.Itoa(int(n))] = n
		for _, s := range names {
			m[s] = n
		}
	}
	return m
}()

func weakGroup(k alg.KE) bool   { return k <= 5 || k >= 22 && k <= 24 }
func legacyGroup(k alg.KE) bool { return k == 25 || k == 26 }

// weak says that an algorithm needs allow_weak.
func (a algorithm) weak() bool {
	return cipherTable[a.name].weak || hashTable[a.name].weak || a.ke != alg.KENone && weakGroup(a.ke)
}

func (a algorithm) legacy() bool {
	return cipherTable[a.name].legacy || hashTable[a.name].legacy || legacyGroup(a.ke)
}

func fold(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", "-") }

// algs reads a list of algorithms.
func (p *parser) algs(q *param) {
	var shownAs []string
	p.listOf(q, func(t token, s string) {
		a := algorithm{pos: t.pos(), text: s}
		p.algorithm(q, &a)
		if !q.bad {
			q.algs = append(q.algs, a)
			if a.legacy() {
				p.l.warnf(a.pos, "%s %s is legacy", q.word, shown(a.text))
			}
		}
		shownAs = append(shownAs, a.text)
	})
	q.text = strings.Join(shownAs, ", ")
}

func (p *parser) algorithm(q *param, a *algorithm) {
	f := fold(a.text)
	ok := true
	switch form := q.kw.spec.form; form {
	case ciphers:
		if full, alias := cipherAliases[f]; alias {
			f = full
		}
		_, ok = cipherTable[f]
		a.name = f
		p.keyLength(q, a)
	case integs:
		f = strings.TrimPrefix(f, "hmac-")
		if f == "sha" {
			f = "sha1"
		}
		_, ok = hashTable[f]
		a.name = f
	default:
		switch {
		case form == groupsOrNone && f == "none", form == pfs && f == "0":
			a.none = true
		case form == pfs && f == "ike":
			a.same = true
		default:
			a.ke, ok = groupByName[f]
		}
	}
	if !ok {
		p.wanted(q, a.pos, a.text)
	}
}

// keyLength reads "(n)", "(..n)", "(n..)" or "(n..m)" behind a cipher.
func (p *parser) keyLength(q *param, a *algorithm) {
	if p.peek().kind != '(' {
		return
	}
	p.next()
	var s strings.Builder
	for p.peek().kind == word && !p.isKeyword(p.i) {
		s.WriteString(p.text(p.next()))
	}
	if p.peek().kind != ')' {
		q.bad = true
		p.errorf(p.peek().pos(), "%s %s: want %q", q.word, shown(a.text+"("+s.String()), ")")
		return
	}
	p.next()
	a.text += "(" + s.String() + ")"
	info, found := cipherTable[a.name]
	if !found {
		return
	}
	from, to, isRange := strings.Cut(s.String(), "..")
	bound := func(s string, open int) (int, bool) {
		if isRange && s == "" {
			return open, true
		}
		n, ok, _ := digits(s)
		return int(min(n, 1<<16)), ok
	}
	lo, ok1 := bound(from, 1)
	hi, ok2 := lo, true
	if isRange {
		hi, ok2 = bound(to, 1<<16)
	}
	fits := func(b int) bool { return b >= lo && b <= hi }
	if s.String() == ".." || !ok1 || !ok2 || !slices.ContainsFunc(info.bits, fits) {
		var want []string
		for _, b := range info.bits {
			want = append(want, strconv.Itoa(b))
		}
		p.fail(q, a.pos, a.text, "key length; want "+or(want))
		return
	}
	a.lo, a.hi = lo, hi
}

// suite is one xform, checked.
type suite struct {
	b          *block
	ciphers    []algorithm
	integ, prf []algorithm
	ke         []algorithm
	additional [][]algorithm
	life       int64 // ms, 0: none
	method     *param
	aead       bool
	needs2     string // what in it IKEv1 cannot express
}

// suite checks a block of its own; weak algorithms are the rules' business.
func (c *checker) suite(b *block) *suite {
	s := &suite{b: b}
	algs := func(key string) []algorithm {
		if p := b.one(key); p != nil {
			return p.algs
		}
		return nil
	}
	s.ciphers, s.integ, s.prf, s.ke = algs("encr_alg"), algs("auth_alg"), algs("prf"), algs("dh_group")
	if b.one("dh_group") == nil {
		s.ke = c.defaults["dh_group"].algs
	}
	for _, p := range b.all("additional_ke") {
		s.additional = append(s.additional, p.algs)
	}
	if p := b.one("ikesa_lifetime_secs"); p != nil {
		s.life = p.num
	}
	s.method = b.one("auth_method")
	plain := false
	for _, a := range s.ciphers {
		if cipherTable[a.name].aead {
			s.aead = true
			if s.needs2 == "" {
				s.needs2 = a.text
			}
		} else {
			plain = true
		}
	}
	if s.prf != nil {
		s.needs2 = "prf"
	}
	if s.additional != nil {
		s.needs2 = "additional_ke"
	}
	if b.bad {
		return s
	}
	encr, integ := b.one("encr_alg"), b.one("auth_alg")
	switch {
	case encr == nil:
		c.errorf(b.pos, "%s: encr_alg missing", b.word)
	case s.aead && plain:
		c.errorf(encr.pos, "%s: AEAD and other ciphers need separate blocks", encr.word)
	case s.aead && integ != nil:
		c.errorf(integ.pos, "%s: not with an AEAD cipher", integ.word)
	case plain && integ == nil:
		c.errorf(b.pos, "%s: auth_alg missing", b.word)
	}
	if a := forced(append([][]algorithm{s.ke}, s.additional...)); a != nil {
		c.errorf(a.pos, "additional_ke %s: already used in this block", shown(a.text))
	}
	for _, a := range s.ke {
		if p := b.one("dh_group"); p != nil && a.ke == alg.KEMLKEM1024 {
			c.l.warnf(a.pos, "%s %s: IKE_SA_INIT cannot be fragmented", p.word, shown(a.text))
		}
	}
	return s
}

// forced finds the first exchange that cannot have a method that none before
// it needs (RFC 9370, 2.2.2: a method is negotiated at most once); nil if all can.
func forced(slots [][]algorithm) *algorithm {
	owner := map[alg.KE]int{}
	var place func(i int, seen map[alg.KE]bool) bool
	place = func(i int, seen map[alg.KE]bool) bool {
		for _, a := range slots[i] {
			if seen[a.ke] {
				continue
			}
			seen[a.ke] = true
			if o, taken := owner[a.ke]; !taken || place(o, seen) {
				owner[a.ke] = i
				return true
			}
		}
		return false
	}
	for i := range slots {
		if len(slots[i]) == 0 || slices.ContainsFunc(slots[i], func(a algorithm) bool { return a.none }) {
			continue
		}
		if !place(i, map[alg.KE]bool{}) {
			return &slots[i][0]
		}
	}
	return nil
}

// proposal makes what of s we can compute. left are the alternatives that we
// cannot; ok is false if nothing usable remains.
func (s *suite) proposal() (p proposal.IKE, left []leftOut, ok bool) {
	ok = true
	// keep notes what is missing; a list needs one that is not.
	keep := func(key string, as []algorithm, has func(algorithm) bool) {
		n := 0
		for _, a := range as {
			if has(a) {
				n++
			} else {
				left = append(left, leftOut{a.pos, fmt.Sprintf("%s %s", key, shown(a.text))})
			}
		}
		ok = ok && (n > 0 || len(as) == 0)
	}
	keep("encr_alg", s.ciphers, func(a algorithm) bool {
		e := cipherTable[a.name].encr
		if e == alg.EncrNone {
			return false
		}
		bits := slices.Clone(e.Info().KeyBits)
		slices.Sort(bits)
		slices.Reverse(bits)
		for _, b := range bits {
			c := proposal.Cipher{Encr: e, Bits: b}
			if (a.hi == 0 || b >= a.lo && b <= a.hi) && !slices.Contains(p.Ciphers, c) {
				p.Ciphers = append(p.Ciphers, c)
			}
		}
		return true
	})
	keep("auth_alg", s.integ, func(a algorithm) bool {
		i := hashTable[a.name].integ
		p.Integ = appendNew(p.Integ, i, i != alg.IntegNone)
		return i != alg.IntegNone
	})
	prfs, word := s.prf, "prf"
	if prfs == nil && s.aead {
		prfs = []algorithm{{name: "sha256"}, {name: "sha384"}, {name: "sha512"}}
	} else if prfs == nil {
		prfs, word = s.integ, "auth_alg"
	}
	keep(word, prfs, func(a algorithm) bool {
		f := hashTable[a.name].prf
		p.PRF = appendNew(p.PRF, f, f != alg.PRFNone)
		return f != alg.PRFNone
	})
	keep("dh_group", s.ke, func(a algorithm) bool {
		has := implemented(a.ke)
		p.KE = appendNew(p.KE, a.ke, has)
		return has
	})
	for _, as := range s.additional {
		var kes []alg.KE
		keep("additional_ke", as, func(a algorithm) bool {
			has := a.none || implemented(a.ke)
			kes = appendNew(kes, a.ke, has)
			return has
		})
		p.AddKE = append(p.AddKE, kes)
	}
	return p, left, ok
}

type leftOut struct {
	pos  Pos
	what string
}

func implemented(k alg.KE) bool { return slices.Contains(alg.AllKE(), k) }

func appendNew[T comparable](l []T, v T, ok bool) []T {
	if ok && !slices.Contains(l, v) {
		l = append(l, v)
	}
	return l
}

// Groups reads a list of key exchange methods as dh_group has it, such as
// "ecp256, 31", of which each must be one that ike has and that is not weak.
func Groups(list string) (kes []alg.KE, err error) {
	for s := range strings.SplitSeq(list, ",") {
		s = strings.TrimSpace(s)
		ke, ok := groupByName[fold(s)]
		switch {
		case !ok:
			return nil, fmt.Errorf("%s: want a group such as 14, ecp256 or x25519", shown(s))
		case weakGroup(ke):
			return nil, fmt.Errorf("%s: weak; needs allow_weak yes in a rule of ike.conf", shown(s))
		case !implemented(ke):
			return nil, fmt.Errorf("%s: not implemented", shown(s))
		}
		kes = appendNew(kes, ke, true)
	}
	return kes, nil
}
