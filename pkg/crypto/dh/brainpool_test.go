package dh

import (
	"bytes"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
)

// RFC 7027, appendix A: private and public values of both sides, and the secret.
func TestRFC7027(t *testing.T) {
	for _, v := range []struct {
		ke                         alg.KE
		da, xa, ya, db, xb, yb, xz string
	}{
		{alg.KEBrainpoolP256R1,
			"81DB1EE100150FF2EA338D708271BE38300CB54241D79950F77B063039804F1D",
			"44106E913F92BC02A1705D9953A8414DB95E1AAA49E81D9E85F929A8E3100BE5",
			"8AB4846F11CACCB73CE49CBDD120F5A900A69FD32C272223F789EF10EB089BDC",
			"55E40BC41E37E3E2AD25C3C6654511FFA8474A91A0032087593852D3E7D76BD3",
			"8D2D688C6CF93E1160AD04CC4429117DC2C41825E1E9FCA0ADDD34E6F1B39F7B",
			"990C57520812BE512641E47034832106BC7D3E8DD0E4C7F1136D7006547CEC6A",
			"89AFC39D41D3B327814B80940B042590F96556EC91E6AE7939BCE31F3A18BF2B"},
		{alg.KEBrainpoolP384R1,
			"1E20F5E048A5886F1F157C74E91BDE2B98C8B52D58E5003D57053FC4B0BD65D6F15EB5D1EE1610DF870795143627D042",
			"68B665DD91C195800650CDD363C625F4E742E8134667B767B1B476793588F885AB698C852D4A6E77A252D6380FCAF068",
			"55BC91A39C9EC01DEE36017B7D673A931236D2F1F5C83942D049E3FA20607493E0D038FF2FD30C2AB67D15C85F7FAA59",
			"032640BC6003C59260F7250C3DB58CE647F98E1260ACCE4ACDA3DD869F74E01F8BA5E0324309DB6A9831497ABAC96670",
			"4D44326F269A597A5B58BBA565DA5556ED7FD9A8A9EB76C25F46DB69D19DC8CE6AD18E404B15738B2086DF37E71D1EB4",
			"62D692136DE56CBE93BF5FA3188EF58BC8A3A0EC6C1E151A21038A42E9185329B5B275903D192F8D4E1F32FE9CC78C48",
			"0BD9D3A7EA0B3D519D09D8E48D0785FB744A6B355E6304BC51C229FBBCE239BBADF6403715C35D4FB2A5444F575D4F42"},
		{alg.KEBrainpoolP512R1,
			"16302FF0DBBB5A8D733DAB7141C1B45ACBC8715939677F6A56850A38BD87BD59B09E80279609FF333EB9D4C061231FB26F92EEB04982A5F1D1764CAD57665422",
			"0A420517E406AAC0ACDCE90FCD71487718D3B953EFD7FBEC5F7F27E28C6149999397E91E029E06457DB2D3E640668B392C2A7E737A7F0BF04436D11640FD09FD",
			"72E6882E8DB28AAD36237CD25D580DB23783961C8DC52DFA2EC138AD472A0FCEF3887CF62B623B2A87DE5C588301EA3E5FC269B373B60724F5E82A6AD147FDE7",
			"230E18E1BCC88A362FA54E4EA3902009292F7F8033624FD471B5D8ACE49D12CFABBC19963DAB8E2F1EBA00BFFB29E4D72D13F2224562F405CB80503666B25429",
			"9D45F66DE5D67E2E6DB6E93A59CE0BB48106097FF78A081DE781CDB31FCE8CCBAAEA8DD4320C4119F1E9CD437A2EAB3731FA9668AB268D871DEDA55A5473199F",
			"2FDC313095BCDD5FB3A91636F07A959C8E86B5636A1E930E8396049CB481961D365CC11453A06C719835475B12CB52FC3C383BCE35E27EF194512B71876285FA",
			"A7927098655F1F9976FA50A9D566865DC530331846381C87256BAF3226244B76D36403C024D7BBF0AA0803EAFF405D3D24F11A9B5C0BEF679FE1454B21C4CD1F"},
	} {
		g := methods[v.ke].(*brainpool)
		key := func(s, x, y string) *brainpoolKey {
			k, ok := g.key(unhex(t, s))
			if !ok {
				t.Fatalf("%v: %s is not in range", v.ke, s)
			}
			if want := unhex(t, x+y); !bytes.Equal(k.Public(), want) {
				t.Errorf("%v: public %x, want %x", v.ke, k.Public(), want)
			}
			return k
		}
		a, b := key(v.da, v.xa, v.ya), key(v.db, v.xb, v.yb)
		for _, p := range [][2]*brainpoolKey{{a, b}, {b, a}} {
			z, err := p[0].Shared(p[1].Public())
			if err != nil || !strings.EqualFold(v.xz, hexOf(z.Bytes())) {
				t.Errorf("%v: secret %x, %v; want %s", v.ke, z.Bytes(), err, v.xz)
			}
		}
	}
}

func hexOf(b []byte) string { return new(big.Int).SetBytes(append([]byte{1}, b...)).Text(16)[1:] }

var brainpools = map[alg.KE][6]string{
	alg.KEBrainpoolP224R1: brainpool224, alg.KEBrainpoolP256R1: brainpool256, alg.KEBrainpoolP384R1: brainpool384, alg.KEBrainpoolP512R1: brainpool512,
}

// The parameters are those of curves of prime order with their base point on
// them, and multiplication gives what the chord and tangent rule gives.
func TestBrainpoolAgainstBig(t *testing.T) {
	for ke, params := range brainpools {
		var v [6]*big.Int
		for i, s := range params {
			v[i], _ = new(big.Int).SetString(s, 16)
		}
		p, a, b, gx, gy, q := v[0], v[1], v[2], v[3], v[4], v[5]
		n := len(params[0]) / 2
		if !p.ProbablyPrime(4) || !q.ProbablyPrime(4) {
			t.Errorf("%v: field or order is not prime", ke)
		}
		mod := func(x *big.Int) *big.Int { return x.Mod(x, p) }
		type pt struct{ x, y *big.Int } // x nil: infinity
		add := func(s, o pt) pt {
			if s.x == nil {
				return o
			}
			if o.x == nil {
				return s
			}
			var num, den *big.Int
			switch {
			case s.x.Cmp(o.x) != 0:
				num, den = new(big.Int).Sub(o.y, s.y), new(big.Int).Sub(o.x, s.x)
			case s.y.Cmp(o.y) != 0:
				return pt{}
			default:
				num = new(big.Int).Mul(s.x, s.x)
				num.Mul(num, big.NewInt(3)).Add(num, a)
				den = new(big.Int).Lsh(s.y, 1)
			}
			l := mod(num.Mul(num, new(big.Int).ModInverse(mod(den), p)))
			x := new(big.Int).Mul(l, l)
			mod(x.Sub(x, s.x).Sub(x, o.x))
			y := new(big.Int).Sub(s.x, x)
			return pt{x, mod(y.Mul(y, l).Sub(y, s.y))}
		}
		times := func(k *big.Int, s pt) (r pt) {
			for i := k.BitLen() - 1; i >= 0; i-- {
				if r = add(r, r); k.Bit(i) == 1 {
					r = add(r, s)
				}
			}
			return r
		}
		base := pt{gx, gy}
		left, right := new(big.Int).Mul(gy, gy), new(big.Int).Mul(gx, gx)
		right.Add(right, a).Mul(right, gx).Add(right, b)
		if mod(left).Cmp(mod(right)) != 0 || times(q, base).x != nil {
			t.Errorf("%v: the base point is not on the curve, or has another order", ke)
		}
		g := methods[ke].(*brainpool)
		k := generate(t, ke, nil).(*brainpoolKey)
		last := new(big.Int).Sub(q, big.NewInt(1))
		for _, x := range []*big.Int{big.NewInt(1), big.NewInt(2), big.NewInt(3), last, new(big.Int).SetBytes(k.x)} {
			k, ok := g.key(x.FillBytes(make([]byte, n)))
			if !ok {
				t.Fatalf("%v: %x is not in range", ke, x)
			}
			r := times(x, base)
			if want := append(r.x.FillBytes(make([]byte, n)), r.y.FillBytes(make([]byte, n))...); !bytes.Equal(k.Public(), want) {
				t.Errorf("%v: %x times the base point is %x, want %x", ke, x, k.Public(), want)
			}
		}
		for _, x := range []*big.Int{new(big.Int), q, new(big.Int).Add(q, big.NewInt(1))} {
			if _, ok := g.key(x.FillBytes(make([]byte, n))); ok {
				t.Errorf("%v: scalar %x accepted", ke, x)
			}
		}
		// RFC 6989, 2.3: not on the curve, coordinates out of the field.
		pub := k.Public()
		bad := map[string][]byte{"zeros": make([]byte, 2*n), "another y": bytes.Clone(pub), "x above p": bytes.Repeat([]byte{0xff}, 2*n)}
		bad["another y"][2*n-1] ^= 1
		y := new(big.Int).SetBytes(pub[n:])
		if y.Add(y, p); y.BitLen() <= 8*n {
			bad["y above p"] = append(bytes.Clone(pub[:n]), y.FillBytes(make([]byte, n))...)
		}
		for name, b := range bad {
			if _, err := k.Shared(b); !errors.Is(err, ErrInvalidPublic) {
				t.Errorf("%v: %s: got %v, want %v", ke, name, err, ErrInvalidPublic)
			}
		}
	}
}
