package stat

import (
	"errors"
	"math"
	"slices"
	"testing"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		q    float64
		want float64
	}{
		{[]float64{3}, 0.5, 3},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 3, 2}, 0.5, 2.5},
		{[]float64{4, 1, 3, 2}, 0, 1},
		{[]float64{4, 1, 3, 2}, 1, 4},
		{[]float64{0, 10}, 0.99, 9.9},
	} {
		in := slices.Clone(c.in)
		if got := Quantile(in, c.q); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("Quantile(%v, %v) = %v, want %v", c.in, c.q, got, c.want)
		}
		if !slices.Equal(in, c.in) {
			t.Errorf("Quantile changed %v to %v", c.in, in)
		}
	}
	if got := Quantile(nil, 0.5); !math.IsNaN(got) {
		t.Errorf("of nothing: %v, want NaN", got)
	}
	if s := Summarize([]float64{5, 1, 3}); s != (Summary{3, 3, 1, 5}) {
		t.Errorf("Summarize = %+v", s)
	}
}

func TestRatios(t *testing.T) {
	got := Ratios(map[int]float64{0: 10, 1: 30, 2: 9, 4: 7}, map[int]float64{0: 5, 1: 10, 3: 1, 4: 0})
	if want := []float64{2, 3}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// path carries limit packets a second and drops the rest; its sender makes at most most.
func path(limit, most float64) func(float64) (Trial, error) {
	return func(rate float64) (Trial, error) {
		sent := min(rate, most)
		delivered := min(sent, limit)
		return Trial{Offered: rate, Sent: sent, Delivered: delivered, Loss: 1 - delivered/sent}, nil
	}
}

func TestSearch(t *testing.T) {
	s := Search{Loss: 0.01, Start: 30000, Floor: 100, Step: 1.05, Trials: 40}
	for _, limit := range []float64{150, 1000, 29000, 30000, 31000, 250000, 4e6} {
		best, ok, err := s.Run(path(limit, math.Inf(1)))
		// 1 % of loss lets the offer be as much above the limit.
		if err != nil || !ok || best.Offered > limit/0.99 || best.Offered < limit/1.05 {
			t.Errorf("limit %v: found %+v %v %v", limit, best, ok, err)
		}
	}
	best, ok, _ := s.Run(path(1e6, 200000))
	if !ok || best.Delivered != 200000 {
		t.Errorf("sender's limit: found %+v %v, want 200000 delivered", best, ok)
	}
	if best, ok, _ := s.Run(path(50, math.Inf(1))); ok {
		t.Errorf("below the floor: found %+v", best)
	}
}

func TestSearchOneStall(t *testing.T) {
	s := Search{Loss: 0.01, Start: 30000, Floor: 100, Step: 1.05, Trials: 40}
	inner := path(100000, math.Inf(1))
	n := 0
	best, _, _ := s.Run(func(rate float64) (Trial, error) {
		n++
		tr, err := inner(rate)
		if n == 2 {
			tr.Loss = 0.03
		}
		return tr, err
	})
	if best.Offered < 95000 {
		t.Errorf("one stall at 60000 left %+v", best)
	}
}

// A sender that was held up once is not at its limit.
func TestSearchSenderStall(t *testing.T) {
	s := Search{Loss: 0.01, Start: 30000, Floor: 100, Step: 1.05, Trials: 40}
	inner := path(200000, math.Inf(1))
	n := 0
	best, _, _ := s.Run(func(rate float64) (Trial, error) {
		n++
		tr, err := inner(rate)
		if n == 1 {
			tr.Sent, tr.Delivered = tr.Sent*0.8, tr.Delivered*0.8
		}
		return tr, err
	})
	if best.Offered < 190000 {
		t.Errorf("found %+v, want 200000", best)
	}
}

func TestSearchEnds(t *testing.T) {
	n := 0
	s := Search{Loss: 0.01, Start: 1, Floor: 0.1, Step: 1.0001, Trials: 7}
	s.Run(func(rate float64) (Trial, error) {
		n++
		return Trial{Offered: rate, Sent: rate, Delivered: rate}, nil
	})
	if n != 7 {
		t.Errorf("%d trials, want 7", n)
	}
	broken := errors.New("broken")
	if _, _, err := s.Run(func(float64) (Trial, error) { return Trial{}, broken }); !errors.Is(err, broken) {
		t.Errorf("error lost: %v", err)
	}
}
