//! Points -> one SVG chart, drawn as text. Numbers under the pointer are shown by `script.js`, which reads them
//! from the chart's own attributes; without a script the chart is still a chart.

use std::fmt::Write;

use super::html::escaped;

/// LIMIT: points of one line. More would only make the page larger: a chart is some 400 pixels wide.
const POINTS_MAX: usize = 400;
const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 30.0;

/// The format of an axis's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// A number.
    Plain,
    /// A size.
    Bytes,
}

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Step and value.
    pub points: Vec<(f64, f64)>,
    /// Number of its colour.
    pub colour: usize,
    /// Each point gets a dot: for few and precious points, such as evaluations.
    pub dots: bool,
    /// Drawn lightly, behind a smoother line of the same numbers.
    pub faint: bool,
}

impl Series {
    /// Returns a plain line.
    pub fn line(name: impl Into<String>, points: Vec<(f64, f64)>, colour: usize) -> Series {
        Series { name: name.into(), points, colour, dots: false, faint: false }
    }
}

/// The content of a chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Title above the chart.
    pub title: String,
    /// Lines, the first behind the others.
    pub series: Vec<Series>,
    /// Unit of the vertical axis.
    pub unit: Unit,
    /// The vertical axis begins at zero.
    pub from_zero: bool,
}

impl Chart {
    /// Returns the chart in a figure; nothing if no line has a point.
    pub fn html(&self) -> String {
        let finite = |series: &Series| {
            let points = series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            Series { points: thinned(points.collect()), ..series.clone() }
        };
        let series: Vec<Series> =
            self.series.iter().map(finite).filter(|one| !one.points.is_empty()).collect();
        let Some(axes) = Axes::around(&series, self.from_zero) else { return String::new() };
        let mut svg = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\" data-unit=\"{}\" \
             data-x=\"{} {} {LEFT} {}\">\n",
            escaped(&self.title),
            if self.unit == Unit::Bytes { "bytes" } else { "" },
            axes.x.0,
            axes.x.1,
            WIDTH - RIGHT
        );
        axes.grid(&mut svg, self.unit);
        for one in &series {
            axes.draw(&mut svg, one);
        }
        svg += "<line class=\"cursor\" y1=\"10\" y2=\"190\" x1=\"-9\" x2=\"-9\"/></svg>";
        format!(
            "<figure><figcaption>{}{}</figcaption>{svg}<div class=\"values\" aria-hidden=\"true\"></div></figure>\n",
            escaped(&self.title),
            legend(&series)
        )
    }
}

/// Returns the names beside their colours, if there is more than one line.
fn legend(series: &[Series]) -> String {
    let shown: Vec<&Series> = series.iter().filter(|one| !one.faint).collect();
    if shown.len() < 2 {
        return String::new();
    }
    let name = |one: &&Series| {
        format!(
            "<span class=\"key\"><i class=\"c{}\"></i>{}</span>",
            one.colour % COLOURS,
            escaped(&one.name)
        )
    };
    format!("<span class=\"legend\">{}</span>", shown.iter().map(name).collect::<String>())
}

/// Colours of the style sheet.
pub const COLOURS: usize = 8;

struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn around(series: &[Series], from_zero: bool) -> Option<Axes> {
        let points = || series.iter().flat_map(|one| &one.points);
        points().next()?;
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let x = range(&mut points().map(|point| point.0));
        let mut y = range(&mut points().map(|point| point.1));
        if from_zero {
            y.0 = y.0.min(0.0);
        }
        Some(Axes { x: apart(x), y: padded(apart(y), from_zero) })
    }

    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let across = (x - self.x.0) / (self.x.1 - self.x.0);
        let up = (y - self.y.0) / (self.y.1 - self.y.0);
        (LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))
    }

    fn grid(&self, svg: &mut String, unit: Unit) {
        let step = match unit {
            Unit::Plain => nice((self.y.1 - self.y.0) / 4.0),
            Unit::Bytes => nice_binary((self.y.1 - self.y.0) / 4.0),
        };
        for value in ticks(self.y, step) {
            let (_, y) = self.place((self.x.0, value));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0,
                written(value, unit).replace(".0 ", " ")
            );
        }
        for value in ticks(self.x, nice((self.x.1 - self.x.0) / 5.0).max(1.0)) {
            let (x, _) = self.place((value, self.y.0));
            let _ = writeln!(
                svg,
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - 12.0,
                written(value, Unit::Plain)
            );
        }
    }

    fn draw(&self, svg: &mut String, one: &Series) {
        let places: Vec<String> = one
            .points
            .iter()
            .map(|point| {
                let (x, y) = self.place(*point);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let values: Vec<String> = one.points.iter().map(|(x, y)| format!("{x},{y}")).collect();
        let faint = if one.faint { " faint" } else { "" };
        let _ = writeln!(
            svg,
            "<polyline class=\"line c{}{faint}\" data-name=\"{}\" data-values=\"{}\" points=\"{}\"/>",
            one.colour % COLOURS,
            escaped(&one.name),
            values.join(" "),
            places.join(" ")
        );
        if one.dots || one.points.len() == 1 {
            for place in &places {
                let (x, y) = place.split_once(',').expect("two numbers");
                let _ = write!(
                    svg,
                    "<circle class=\"dot c{}\" cx=\"{x}\" cy=\"{y}\" r=\"3\"/>",
                    one.colour % COLOURS
                );
            }
        }
    }
}

/// Returns the range of values. A range of one value gets some room around it.
fn apart((low, high): (f64, f64)) -> (f64, f64) {
    match high > low {
        true => (low, high),
        false => (low - low.abs().max(1.0) * 0.05, high + high.abs().max(1.0) * 0.05),
    }
}

fn padded((low, high): (f64, f64), from_zero: bool) -> (f64, f64) {
    let room = (high - low) * 0.06;
    (if from_zero && low >= 0.0 { 0.0 } else { low - room }, high + room)
}

/// Returns the next number from `rough` upwards that is 1, 2 or 5 times a power of ten.
fn nice(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * power >= rough).unwrap_or(10.0);
    times * power
}

/// Returns a power of two near `rough`, so that bytes have round names.
fn nice_binary(rough: f64) -> f64 {
    2f64.powf(rough.max(1.0).log2().ceil())
}

fn ticks((low, high): (f64, f64), step: f64) -> Vec<f64> {
    let first = (low / step).ceil();
    (0..12).map(|count| (first + f64::from(count)) * step).take_while(|value| *value <= high).collect()
}

/// Returns a number in few letters.
pub fn written(value: f64, unit: Unit) -> String {
    if unit == Unit::Bytes {
        return crate::words::size(value.max(0.0) as u64);
    }
    let size = value.abs();
    let trimmed = |text: String| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    match size {
        0.0 => "0".into(),
        _ if size >= 1e9 => trimmed(format!("{:.2}", value / 1e9)) + "G",
        _ if size >= 1e6 => trimmed(format!("{:.2}", value / 1e6)) + "M",
        _ if size >= 1e4 => trimmed(format!("{:.1}", value / 1e3)) + "k",
        _ if size >= 100.0 => trimmed(format!("{value:.1}")),
        _ if size >= 0.01 => trimmed(format!("{value:.4}")),
        _ => {
            let text = format!("{value:.2e}");
            let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{power}", trimmed(digits.to_owned()))
        }
    }
}

/// Returns at most `POINTS_MAX` points: of each stretch the lowest and the highest, so that no spike is lost.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= POINTS_MAX {
        return points;
    }
    let stretch = points.len().div_ceil(POINTS_MAX / 2);
    let of = |part: &[(f64, f64)]| {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let low = *part.iter().min_by(by_height).expect("chunks are not empty");
        let high = *part.iter().max_by(by_height).expect("chunks are not empty");
        let mut pair = vec![low, high];
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair.dedup();
        pair
    };
    points.chunks(stretch).flat_map(of).collect()
}

/// Returns the same points, each replaced by a mean of the points before it (an exponential one over a twentieth of the
/// run).
pub fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let share = 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let mut mean: Option<f64> = None;
    let mut next = |value: f64| {
        let new = mean.map_or(value, |mean| mean + share * (value - mean));
        mean = Some(new);
        new
    };
    points.iter().map(|(x, y)| (*x, next(*y))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = |value| written(value, Unit::Plain);
        let list = [0.0, 2e-4, 0.05, 1.5, 123.45, 15_000.0, 2_500_000.0, -0.000_123, 1e10].map(shown);
        assert_eq!(list, ["0", "2e-4", "0.05", "1.5", "123.5", "15k", "2.5M", "-1.23e-4", "10G"]);
        assert_eq!(written((3u64 << 30) as f64, Unit::Bytes), "3.0 GiB");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.3, 2.2), nice(1.9 / 4.0)), [0.5, 1.0, 1.5, 2.0]);
        assert_eq!(nice(0.3), 0.5);
        assert_eq!(nice_binary(3e9), (4u64 << 30) as f64);
    }

    #[test]
    fn long_lines_are_thinned_without_losing_a_spike() {
        let points: Vec<(f64, f64)> =
            (0..100_000).map(|i| (f64::from(i), if i == 54_321 { 99.0 } else { 1.0 })).collect();
        let thin = thinned(points);
        assert!(thin.len() <= POINTS_MAX + 2, "{}", thin.len());
        assert!(thin.contains(&(54_321.0, 99.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn a_chart_of_nothing_finite_is_nothing_and_names_are_text() {
        let chart = |points| Chart {
            title: "<b>loss</b>".into(),
            series: vec![Series::line("\"><script>", points, 0)],
            unit: Unit::Plain,
            from_zero: false,
        };
        assert_eq!(chart(vec![(1.0, f64::NAN), (f64::INFINITY, 1.0)]).html(), "");
        let html = chart(vec![(1.0, 2.0), (2.0, 1.0), (3.0, f64::NAN)]).html();
        assert!(!html.contains("<script") && !html.contains("<b>") && !html.contains("NaN"), "{html}");
        assert!(html.contains("data-values=\"1,2 2,1\""), "{html}");
        assert!(chart(vec![(1.0, 1.0)]).html().contains("<circle"), "one point is a dot");
    }

    #[test]
    fn labels_of_bytes_fit_beside_the_chart() {
        for most in [65.3, 900.0, 70_000.0] {
            let points = vec![(1.0, 0.0), (2.0, most * f64::from(1 << 20))];
            let series = vec![Series::line("memory", points, 0)];
            let html = Chart { title: "Memory".into(), series, unit: Unit::Bytes, from_zero: true }.html();
            let labels = html.split("text-anchor=\"end\">").skip(1).filter_map(|part| part.split('<').next());
            let labels: Vec<&str> = labels.collect();
            assert!(labels.len() > 1 && labels.iter().all(|label| label.len() <= 7), "{labels:?}");
        }
    }

    #[test]
    fn a_mean_follows_its_points() {
        let flat: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 3.0)).collect();
        assert_eq!(smoothed(&flat), flat);
        assert_eq!(
            smoothed(&[(0.0, 1.0), (1.0, 2.0)]),
            [(0.0, 1.0), (1.0, 2.0)],
            "a short run stays as it is"
        );
    }
}
